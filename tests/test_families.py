"""Every dense family: it is streamed as transformers computes it, and a static prune of it is the dense model without
some neurons."""

import copy
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import CONFIGS, SLIDING_WINDOW, edit_json, relative_error, save_dense, some_tokens
from families import TINY, WHOLE_HEADS
from matplotlib import pyplot
from test_hosts import HOSTS_OF
from torch.func import functional_call
from transformers import AutoModelForCausalLM

from factorllm import FactorLLMError, HealSettings, Recipe, factorize, heal
from factorllm.dense import open_model
from factorllm.dense.ends import Ends
from factorllm.dense.families import FAMILIES, family_of
from factorllm.dense.layer import ffn_of
from factorllm.dense.modules import final_norm, layers_with_ffn
from factorllm.dense.pretrained import skeleton
from factorllm.dense.safetensors import open_folder
from factorllm.exporting.checkpoints import open_checkpoint
from factorllm.exporting.rounded import types_in_file
from factorllm.healing.targets import Asked, ask
from factorllm.hosts import HOSTS, MoeHost
from factorllm.measure.routing import route_prompt
from factorllm.report.plots import error_figure, routing_figure
from factorllm.report.summary import layer_table
from factorllm.student.read import read_partitions, read_provenance
from factorllm.student.routers import Routers, router_weight


def test_there_is_a_tiny_model_of_each_family():
    assert TINY.keys() == FAMILIES.keys()


@pytest.mark.parametrize("config", [*TINY.values(), *CONFIGS.values()], ids=lambda config: config.model_type)
def test_a_skeleton_is_the_model_without_values(config):
    empty, whole = skeleton(config), AutoModelForCausalLM.from_config(copy.deepcopy(config))
    assert [(name, each.shape) for name, each in empty.named_parameters()] == [
        (name, each.shape) for name, each in whole.named_parameters()
    ]
    assert all(each.is_meta for each in empty.parameters())
    wanted = dict(whole.named_buffers())  # they are no part of a checkpoint, and are what the model computes with
    assert dict(empty.named_buffers()).keys() == wanted.keys()
    for name, buffer in empty.named_buffers():
        torch.testing.assert_close(buffer, wanted[name], msg=name)


def test_models_that_are_made_beside_a_skeleton_have_values():
    """A skeleton turns initialisation off for a moment, for all threads."""
    config = CONFIGS["gqa-tied"]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(skeleton, [config] * 32))
    assert AutoModelForCausalLM.from_config(copy.deepcopy(config)).model.embed_tokens.weight.std() > 0.1


def pruned_by_hand(model, orders: list[list[int]]) -> None:
    """Zero the down columns of all neurons but those that a prune kept."""
    layout = family_of(model.config).ffn
    for layer, kept in zip(layers_with_ffn(model), orders, strict=True):
        down = layer.get_submodule(f"{layout.slot}.{layout.down}").weight.data
        dropped = torch.ones(down.shape[1], dtype=torch.bool)
        dropped[kept] = False
        down[:, dropped] = 0


@pytest.mark.parametrize("family", TINY)
def test_a_static_prune_is_the_dense_model_without_some_neurons(family, tmp_path, text_file, small):
    dense = save_dense(TINY[family], tmp_path / "dense")
    recipe = Recipe(shared=4, active=0, parts=8, restore="none")
    out = tmp_path / "out"
    factorize(str(tmp_path / "dense"), out, recipe, text=str(text_file), settings=small)
    pruned, found = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"] | found["mismatched_keys"]
    assert pruned.config.model_type == family
    orders = json.loads((out / "factorllm.partition.json").read_text())
    assert {len(order) for order in orders} == {32}
    pruned_by_hand(dense, orders)
    tokens = some_tokens(dense.config)
    with torch.inference_mode():
        assert relative_error(pruned(tokens).logits, dense(tokens).logits) < 1e-5
        assert pruned.generate(tokens[:, :4], max_new_tokens=2, do_sample=False).shape[1] > 4
    check_matrices_are_known(out)


UNLIKE_LLAMA = [name for name, family in FAMILIES.items() if family.norm_follows or family.ffn.gate is None]


@pytest.mark.parametrize("family", [*UNLIKE_LLAMA, "granite"])
def test_a_prune_is_restored_where_the_ffn_is_not_llamas(family, tmp_path, text_file, small):
    """Refitting what is left brings it nearer to the dense model: with a norm after the FFN, a factor, or no gate."""
    save_dense(TINY[family], tmp_path / "dense")
    errors = {}
    for restore in ("none", "stream"):
        recipe = Recipe(shared=4, active=0, parts=8, restore=restore)
        summary = factorize(str(tmp_path / "dense"), tmp_path / restore, recipe, text=str(text_file), settings=small)
        errors[restore] = summary.layers[-1]["stream_error"]
    assert errors["stream"] < errors["none"]


def test_only_layers_that_have_an_ffn_are_cut_counted_and_healed(tmp_path, text_file, small):
    """Of Nemotron-H, whose other layers are Mamba or attention: a prune and its healing leave them as they were."""
    dense = save_dense(TINY["nemotron_h"], tmp_path / "dense")
    summary = factorize(str(tmp_path / "dense"), tmp_path / "out", "S4A0E8", text=str(text_file), settings=small)
    assert [layer["layer"] for layer in summary.layers] == [1, 3]
    cut = 2 * 2 * 32 * 32  # in two FFNs, of up and down, half of 64 neurons
    assert summary.row("dense").cost.total_parameters == sum(p.numel() for p in dense.parameters())
    assert summary.row("student").cost.total_parameters == summary.row("dense").cost.total_parameters - cut
    settings = HealSettings(
        tokens=2048, validation_tokens=256, evaluations=1, learning_rate=1e-3, train="ffn", precision="float32"
    )
    healed = heal(
        tmp_path / "out", str(tmp_path / "dense"), tmp_path / "healed", text=str(text_file), settings=settings
    )
    assert "nothing was gained" not in healed.outcome
    before, after = (open_folder(tmp_path / name, name)[2] for name in ("out", "healed"))
    changed = {name for name in before.names() if not torch.equal(before.read(name), after.read(name))}
    assert changed == {f"model.layers.{i}.mixer.{name}_proj.weight" for i in (1, 3) for name in ("up", "down")}


def test_layers_with_experts_keep_their_numbers(tmp_path, text_file, small):
    factorized("nemotron_h", "nemotron_h", "S2A2E8", tmp_path, text_file, small)
    assert route_prompt(tmp_path / "out", "words").layer == 3
    assert route_prompt(tmp_path / "out", "words", 1).layer == 1
    with pytest.raises(FactorLLMError, match=r"no layer 2 with experts; those of .* are 1, 3: give one"):
        route_prompt(tmp_path / "out", "words", 2)
    layers = read_provenance(tmp_path / "out")["layers"]
    assert list(layer_table(layers).columns[0].cells) == ["1", "3"]
    for figure in (error_figure(layers), routing_figure(layers)):
        assert list(figure.axes[0].lines[0].get_xdata()) == [1, 3]
        pyplot.close(figure)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "cohere", "stablelm", "nemotron", "nemotron_h"])
def test_each_kind_of_final_norm_carries_a_scale(family, tmp_path):
    dense = save_dense(TINY[family], tmp_path)
    norm, states = final_norm(dense.get_decoder()), torch.randn(3, dense.config.hidden_size)
    scaled = Ends(open_model(str(tmp_path)), torch.device("cpu")).scaled_norm(1.5)
    weights = {name.rpartition(".")[2]: weight for name, weight in scaled.items()}
    with torch.no_grad():
        assert relative_error(functional_call(norm, weights, (states,)), 1.5 * norm(states)) < 1e-6


@pytest.mark.parametrize("family", [name for name, family in FAMILIES.items() if family.no_host])
def test_a_family_without_a_host_is_told_why_and_what_to_do(family, tmp_path, text_file, small):
    save_dense(TINY[family], tmp_path / "dense")
    with pytest.raises(FactorLLMError, match=r"no architecture with experts .* factorllm prune"):
        factorize(str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), settings=small)
    assert not (tmp_path / "out").exists()


MOE_HOSTS = [host for host in HOSTS.values() if isinstance(host, MoeHost)]
PAIRS = [
    (family, host.name, shared)
    for host in MOE_HOSTS
    for family in host.families
    for shared in (0, 1)
    if host.shared != ("always" if shared == 0 else "no")
]
"""Each dense family in each of its hosts, without and with a shared part."""


TESTED_THERE = {(CONFIGS[name].model_type, host) for name, hosts in HOSTS_OF.items() for host in hosts}
"""Families with their hosts that `test_hosts` builds in all shapes."""

SPECIAL = {
    ("phi3", "mixtral"): WHOLE_HEADS,
    ("phi3", "granitemoeshared"): WHOLE_HEADS,
    ("mistral", "granitemoe_swa"): SLIDING_WINDOW,
}
"""Configs that differ from `TINY` where a host holds a part of a family, or is there for a part of it."""


def factorized(family, host, recipe, tmp_path, text_file, small):
    dense = save_dense(SPECIAL.get((family, host), TINY[family]), tmp_path / "dense")
    settings = small.model_copy(update={"host": host})
    factorize(str(tmp_path / "dense"), tmp_path / "out", recipe, text=str(text_file), settings=settings)
    student, found = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not found["missing_keys"] | found["unexpected_keys"] | found["mismatched_keys"]
    return dense, student


@pytest.mark.parametrize(("family", "host", "shared"), [pair for pair in PAIRS if pair[:2] not in TESTED_THERE])
def test_with_all_experts_on_each_family_is_the_dense_model(family, host, shared, tmp_path, text_file, small):
    recipe = Recipe(shared=shared, active=8 - shared, parts=8, router="analytic", restore="none")
    dense, student = factorized(family, host, recipe, tmp_path, text_file, small)
    assert student.config.model_type == host
    # Some hosts hold a family within one window, or without scaled positions, only; their configs say so.
    tokens = some_tokens(dense.config, length=min(48, student.config.max_position_embeddings))
    with torch.inference_mode():
        assert relative_error(student(tokens).logits, dense(tokens).logits) < 1e-5
        assert student.generate(tokens[:, :4], max_new_tokens=2, do_sample=False).shape[1] > 4
    student.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    with torch.inference_mode():
        assert torch.equal(again(tokens).logits, student(tokens).logits)


@pytest.mark.parametrize(("family", "host", "shared"), PAIRS)
def test_the_picked_experts_of_each_host_count_once(family, host, shared, tmp_path, text_file, small):
    """Two of many experts on: the layer gives the sum of their dense neurons, whatever the host makes of logits."""
    recipe = Recipe(shared=shared, active=2, parts=8, router="analytic", restore="none")
    dense, student = factorized(family, host, recipe, tmp_path, text_file, small)
    splits = read_partitions(tmp_path / "out", recipe.shape(64))
    routers = [router_weight(module) for module in Routers(student).modules]
    assert {tuple(weight.shape) for weight in routers} == {(8 - shared, 32)}
    for layer, split, weight in zip(layers_with_ffn(dense), splits, routers, strict=True):
        ffn, slot = ffn_of(layer, dense.config), family_of(dense.config).ffn.slot
        setattr(layer, slot, PickedExperts(ffn, split, weight))
    tokens = some_tokens(dense.config, length=min(48, student.config.max_position_embeddings))
    with torch.inference_mode():
        got, wanted = student(tokens).logits, dense(tokens).logits
    # Of most tokens: gate weights are only nearly 1, so that two scores that nearly tie may change places later on.
    assert ((got - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 1e-2


class PickedExperts(torch.nn.Module):
    """The dense neurons of the shared part and of the experts that a router picks."""

    def __init__(self, ffn, split, router):
        super().__init__()
        self.ffn, self.split, self.router = ffn, split, router

    def forward(self, x):
        tokens = x.flatten(0, 1)
        picks = torch.zeros(len(tokens), len(self.router))
        picks.scatter_(1, (tokens @ self.router.T).topk(2).indices, 1.0)
        parts = [(self.ffn.part(self.split.shared), torch.ones(len(tokens)))]
        parts += [(self.ffn.part(neurons), pick) for neurons, pick in zip(self.split.experts, picks.T, strict=True)]
        return sum(part.hidden(tokens) @ part.down.T * pick[:, None] for part, pick in parts).view_as(x)


@pytest.mark.parametrize(("family", "host", "shared"), {host: (f, host, s) for f, host, s in PAIRS}.values())
def test_each_host_heals(family, host, shared, tmp_path, text_file, small):
    recipe = Recipe(shared=shared, active=2, parts=8)
    dense, _ = factorized(family, host, recipe, tmp_path, text_file, small)
    targets = ask(dense, some_tokens(dense.config), ASKED)
    with torch.inference_mode():
        wanted = dense(some_tokens(dense.config)).logits.log_softmax(-1).max(-1).values
    assert torch.allclose(targets["top_log_probs"][..., 0].float(), wanted, atol=1e-2)
    settings = HealSettings(
        tokens=1024, validation_tokens=256, evaluations=1, learning_rate=1e-4, train="router", precision="float32"
    )
    healed = heal(
        tmp_path / "out", str(tmp_path / "dense"), tmp_path / "healed", text=str(text_file), settings=settings
    )
    assert healed.results["healed"]["perplexity"] > 0
    before, after = (
        [router_weight(module) for module in Routers(AutoModelForCausalLM.from_pretrained(tmp_path / name)).modules]
        for name in ("out", "healed")
    )
    moved = [not torch.equal(one, other) for one, other in zip(before, after, strict=True)]
    assert all(moved) or "nothing was gained" in healed.outcome
    check_matrices_are_known(tmp_path / "out")


def check_matrices_are_known(folder):
    """Of each tensor that a file rounds it is known which parameter it is, so that healing can round it too."""
    checkpoint = open_checkpoint(str(folder))
    if checkpoint.host.reason_against_gguf(checkpoint.config) is None:
        assert types_in_file(checkpoint.load(torch.float32, torch.device("cpu")), checkpoint, "bf16")


ASKED = Asked(vocabulary=4, temperature=1.0, partitions=[], top_k=2, prior="energy", bfloat16=False, streams=0)


@pytest.mark.parametrize(
    ("key", "value"), [("hidden_size_per_layer_input", 8), ("num_kv_shared_layers", 1), ("use_double_wide_mlp", True)]
)
def test_layers_that_read_more_than_the_stream_are_refused_by_name(key, value, tmp_path):
    save_dense(TINY["gemma4_text"], tmp_path)
    edit_json(tmp_path / "config.json", **{key: value})
    with pytest.raises(FactorLLMError, match=f"says {key} = {value}, which"):
        open_model(str(tmp_path))
