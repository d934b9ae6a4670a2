"""Each host holds the student exactly: with every expert on it is the dense model."""

import pytest
import torch
from conftest import ATTENTION_BIAS, BASE, CONFIGS, SLIDING_WINDOW, WIDE_HEADS, relative_error, save_dense, some_tokens
from families import SPECIAL, TINY
from transformers import AutoConfig, AutoModelForCausalLM, CohereConfig, MistralConfig

from factorllm import FactorLLMError, Recipe, factorize, parse_recipe
from factorllm.dense.families import ffn_width
from factorllm.hosts import HOSTS, MoeHost, choose_host
from factorllm.student.read import read_partitions

HOSTS_OF = {
    **dict.fromkeys(CONFIGS, ("mixtral", "granitemoeshared", "qwen2_moe", "glm4_moe")),
    "qwen2": ("qwen2_moe", "glm4_moe"),
    "qwen3": ("qwen3_moe", "glm4_moe"),
}
WITHOUT_SHARED, ONLY_SHARED = {"mixtral", "qwen3_moe"}, {"granitemoeshared", "glm4_moe"}

PAIRS = [
    (name, host, shared)
    for name, hosts in HOSTS_OF.items()
    for host in hosts
    for shared in (0, 2)
    if host not in (ONLY_SHARED if shared == 0 else WITHOUT_SHARED)
]
"""Each dense config, in each of its hosts, with and without a shared part."""


def build(config, recipe, tmp_path, text_file, small, host="auto"):
    dense = save_dense(config, tmp_path / "dense")
    factorize(
        str(tmp_path / "dense"),
        tmp_path / "out",
        recipe,
        text=str(text_file),
        settings=small.model_copy(update={"host": host}),
    )
    return dense, AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)


@pytest.mark.parametrize(("name", "host", "shared"), PAIRS)
def test_all_experts_on_equals_dense(name, host, shared, tmp_path, text_file, small):
    recipe = Recipe(shared=shared, active=8 - shared, parts=8, router="analytic", restore="none")
    dense, student = build(CONFIGS[name], recipe, tmp_path, text_file, small, host)
    assert student.config.model_type == host
    tokens = some_tokens(CONFIGS[name])
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


@pytest.mark.parametrize(
    ("config", "shared", "host"),
    [
        (CONFIGS["mha"], 0, "mixtral"),
        (CONFIGS["mha"], 2, "granitemoeshared"),
        (CONFIGS["qwen2"], 0, "qwen2_moe"),
        (CONFIGS["qwen2"], 2, "qwen2_moe"),
        (CONFIGS["qwen3"], 0, "qwen3_moe"),
        (CONFIGS["qwen3"], 2, "glm4_moe"),
        (ATTENTION_BIAS, 2, "granitemoeshared"),
        (WIDE_HEADS, 0, "mixtral"),
        (WIDE_HEADS, 2, "glm4_moe"),
        (SLIDING_WINDOW, 0, "mixtral"),
        (SLIDING_WINDOW, 2, "granitemoe_swa"),
    ],
    ids=lambda value: getattr(value, "model_type", value),
)
def test_auto_takes_the_first_host_that_is_exact(config, shared, host, tmp_path, text_file, small):
    recipe = Recipe(shared=shared, active=8 - shared, parts=8, router="analytic", restore="none")
    dense, student = build(config, recipe, tmp_path, text_file, small)
    assert student.config.model_type == host
    tokens = some_tokens(config)
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


def test_the_experts_of_a_sparse_student_sum_to_the_dense_ffn(tmp_path, text_file, small):
    """The checkpoint of S2A2E8 itself, its top-k raised to all: nothing was lost and nothing is there twice."""
    recipe = Recipe(shared=2, active=2, parts=8, restore="none")
    dense, student = build(CONFIGS["gqa-tied"], recipe, tmp_path, text_file, small)
    for layer in student.model.layers:
        router = layer.block_sparse_moe.router
        router.top_k = 6
        router.weight.data.zero_()
        layer.block_sparse_moe.experts.down_proj.data *= 6 / 2  # stored times k = 2, gates are now 1/6
    tokens = some_tokens(student.config)
    with torch.no_grad():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5


@pytest.mark.parametrize(("recipe", "host"), [("S0A2E4N3", "mixtral"), ("S1A1E4N4", "granitemoeshared")])
def test_overlapping_experts_hold_the_dense_neurons_unchanged(recipe, host, tmp_path, text_file, small):
    recipe = parse_recipe(recipe).model_copy(update={"restore": "none"})
    dense, student = build(CONFIGS["gqa-tied"], recipe, tmp_path, text_file, small)
    assert student.config.model_type == host
    shape = recipe.shape(dense.config.intermediate_size)
    splits = read_partitions(tmp_path / "out", shape)
    for split, before, after in zip(splits, dense.model.layers, student.model.layers, strict=True):
        experts = (after.mlp if host == "mixtral" else after.block_sparse_moe).experts
        for number, neurons in enumerate(split.experts):
            gate, up = experts.gate_up_proj[number].chunk(2)
            assert torch.equal(gate, before.mlp.gate_proj.weight[neurons])
            assert torch.equal(up, before.mlp.up_proj.weight[neurons])
            assert torch.equal(experts.down_proj[number], before.mlp.down_proj.weight[:, neurons])


@pytest.mark.parametrize("host", ["qwen2_moe", "glm4_moe"])
def test_top_k_can_be_changed_when_serving(host, tmp_path, text_file, small):
    """One checkpoint of top-2; loaded with every expert on it is the dense model but for gates that are nearly 1."""
    recipe = Recipe(shared=2, active=2, parts=8, restore="none")
    dense, _ = build(CONFIGS["qwen2"], recipe, tmp_path, text_file, small, host)
    tokens = some_tokens(CONFIGS["qwen2"])
    with torch.no_grad():
        wanted, errors = dense(tokens).logits, []
        for top_k in (2, 4, 6):
            student = AutoModelForCausalLM.from_pretrained(
                tmp_path / "out", num_experts_per_tok=top_k, dtype=torch.float32
            )
            errors.append(relative_error(student(tokens).logits, wanted))
    assert errors[0] > errors[1] > 10 * errors[2]


@pytest.mark.parametrize("backend", ["eager", "batched_mm", "grouped_mm"])
def test_every_experts_backend_gives_the_same_logits(backend, tmp_path, text_file, small):
    _, student = build(CONFIGS["gqa-tied"], Recipe(shared=2, active=2, parts=8), tmp_path, text_file, small)
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32, experts_implementation=backend)
    tokens = some_tokens(student.config)
    with torch.no_grad():
        assert relative_error(other(tokens).logits, student(tokens).logits) < 1e-5


HALVED = {
    "mixtral": ("llama", "S0A2E4"),
    "granitemoeshared": ("llama", "S2A2E8"),
    "granitemoe": ("granite", "S0A2E4"),
    "qwen3_moe": ("qwen3", "S0A2E4"),
    "qwen2_moe": ("qwen2", "S2A2E8"),
    "glm4_moe": ("qwen3", "S2A2E8"),
    "granitemoe_swa": ("smollm3", "S0A2E4"),
    "qwen3_5_moe_text": ("qwen3_5_text", "S0A2E4"),
    "granitemoehybrid": ("granitemoehybrid", "S2A2E8"),
    "lfm2_moe": ("lfm2", "S0A2E4"),
    "gemma4_text": ("gemma4_text", "S0A2E4"),
    "flex_olmo": ("olmo2", "S0A2E4"),
    "cohere2_moe": ("cohere", "S1A2E8"),
    "hunyuan_v1_moe": ("hunyuan_v1_dense", "S1A2E8"),
    "ernie4_5_moe": ("ernie4_5", "S2A2E8"),
    "qwen3_vl_moe_text": ("qwen3_vl_text", "S0A2E8"),
    "nemotron_h": ("nemotron_h", "S2A2E8"),
}
"""A dense family and a recipe for each host."""


@torch.no_grad()
def first_picks(folder, dtype, tokens):
    """(tokens, k): the experts that transformers runs in the first layer that has some."""
    model, picks = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), []
    experts = next(module for name, module in model.named_modules() if name.endswith(".experts"))
    experts.register_forward_pre_hook(lambda module, inputs: picks.append(inputs[1]))
    model(tokens)
    return picks[0]


@pytest.mark.parametrize("host", [name for name, host in HOSTS.items() if isinstance(host, MoeHost)])
def test_half_precision_runs_the_same_experts_unless_the_host_says_that_it_does_not(host, tmp_path, text_file, small):
    family, recipe = HALVED[host]
    few = small.model_copy(update={"tokens": 512})
    build(TINY[family], recipe, tmp_path, text_file, few, host)
    tokens = some_tokens(TINY[family])
    exact = first_picks(tmp_path / "out", torch.float32, tokens)
    rounded = first_picks(tmp_path / "out", torch.bfloat16, tokens)
    same = (exact[:, :, None] == rounded[:, None, :]).any(-1).float().mean()
    assert (same < 0.8) if HOSTS[host].ties_in_half else (same > 0.95)


def test_a_student_whose_gate_weights_tie_in_half_precision_is_written_in_float32(tmp_path, text_file, small):
    save_dense(TINY["lfm2"], tmp_path / "dense").bfloat16().save_pretrained(tmp_path / "dense")
    for dtype in ("bfloat16", "float16"):
        with pytest.raises(FactorLLMError, match=f"in {dtype} the gate weights of lfm2_moe .* use --dtype float32"):
            factorize(
                str(tmp_path / "dense"),
                tmp_path / "out",
                "S0A2E4",
                text=str(text_file),
                settings=small.model_copy(update={"dtype": dtype}),
            )
    factorize(str(tmp_path / "dense"), tmp_path / "out", "S0A2E4", text=str(text_file), settings=small)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.float32
    assert "Load it in float32" in (tmp_path / "out" / "README.md").read_text()
    factorize(str(tmp_path / "dense"), tmp_path / "prune", "S4A0E8", text=str(text_file), settings=small)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "prune").dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("config", "recipe", "host", "says"),
    [
        (CONFIGS["mha"], "S2A2E8", "mixtral", "it has no shared expert; --host auto"),
        (CONFIGS["mha"], "S0A2E4", "granitemoeshared", "always has a shared expert"),
        (CONFIGS["mha"], "S2A2E8", "dense", "it has no experts"),
        (CONFIGS["mha"], "S2A2E8", "nonsense", "no host 'nonsense'; hosts: auto"),
        (ATTENTION_BIAS, "S0A2E4", "auto", "its attention has no biases"),
        (ATTENTION_BIAS, "S2A2E8", "qwen2_moe", "its attention output has no bias"),
        (WIDE_HEADS, "S2A2E8", "granitemoeshared", "head_dim = hidden_size / heads"),
        (SLIDING_WINDOW, "S2A2E8", "granitemoeshared", "no sliding window"),
        (CONFIGS["qwen3"], "S2A2E8", "granitemoeshared", "does not normalise queries and keys"),
        (CONFIGS["qwen2"], "S0A2E4", "qwen3_moe", "it normalises queries and keys"),
        (TINY["nemotron_h"], "S0A2E8", "nemotron_h", "always has a shared expert"),
        (TINY["nemotron_h"], "S1A1E2", "nemotron_h", "needs two routed experts at least"),
        (CONFIGS["mha"], "S4A2E16", "auto", "experts of 4 neurons, but transformers' grouped_mm needs multiples of 8"),
    ],
)
def test_what_cannot_be_exact_is_refused(config, recipe, host, says):
    with pytest.raises(FactorLLMError, match=says):
        choose_host(host, config, parse_recipe(recipe).shape(config.intermediate_size))


NORMALISING = CohereConfig.from_dict(TINY["cohere"].to_dict() | {"use_qk_norm": True})  # Command R+


@pytest.mark.parametrize(
    ("config", "recipe", "instead"),
    [
        (TINY["lfm2"], "S2A2E8", "--recipe S0A4E8 leaves as much out, and can be held"),
        (TINY["hunyuan_v1_dense"], "S2A2E8", "--recipe S1A3E8 leaves as much out, and can be held"),
        (NORMALISING, "S2A2E8", "a static prune needs none: factorllm prune"),
    ],
)
def test_where_no_host_fits_what_does_is_said(config, recipe, instead):
    width = ffn_width(config)
    with pytest.raises(FactorLLMError, match=f"no host can hold this student exactly: .*; {instead}$"):
        choose_host("auto", config, parse_recipe(recipe).shape(width))
    if "--recipe" in instead:
        choose_host("auto", config, parse_recipe(instead.split()[1]).shape(width))


def test_a_window_that_no_text_fills_is_none():
    """Ministral 8B's is as long as the texts that it reads, and Phi-4-mini's longer."""
    shape = parse_recipe("S2A2E8").shape(BASE["intermediate_size"])
    longest, tokens = BASE["max_position_embeddings"], some_tokens(CONFIGS["mha"], length=64)
    logits, hosts = {}, {}
    for window in (None, longest, longest - 1):
        config = MistralConfig(**BASE | {"sliding_window": window})
        torch.manual_seed(0)
        logits[window] = AutoModelForCausalLM.from_config(config).eval()(tokens).logits
        hosts[window] = choose_host("auto", config, shape).name
    assert hosts == {None: "granitemoeshared", longest: "granitemoeshared", longest - 1: "granitemoe_swa"}
    assert torch.equal(logits[longest], logits[None])
    assert not torch.equal(logits[longest - 1], logits[None])


def test_a_host_without_a_place_for_something_is_refused_before_the_work(tmp_path, text_file, small, monkeypatch):
    """Transformers leaves out what it has no place for, and says so to nobody who does not look."""
    config = AutoConfig.for_model("helium", **BASE | SPECIAL["helium"] | {"attention_bias": True})
    save_dense(config, tmp_path / "dense")

    def refused(match: str):
        with pytest.raises(FactorLLMError, match=match):
            factorize(str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)
        assert not (tmp_path / "out").exists()

    refused("its attention has no biases of Helium's")
    monkeypatch.setattr(HOSTS["ernie4_5_moe"], "_reason_against_family", lambda config: None)
    refused(r"it has no place for model\.layers\.0\.self_attn\.k_proj\.bias; a static prune needs no host")
