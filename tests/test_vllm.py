"""vLLM loads each host as it is and agrees with transformers. Run by `make test-vllm`, in whose environment vLLM is."""

import copy
import subprocess
from pathlib import Path
from statistics import median

import pytest
import torch
from conftest import CONFIGS, SLIDING_WINDOW, served, some_tokens
from families import TINY, WHOLE_HEADS
from safetensors.torch import load_file, save_file
from test_export import factorized
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from factorllm import FactorLLMError
from factorllm.convert.route import FLATTEN
from factorllm.dense.families import ffn_layers
from factorllm.engines import EngineProcess, Options, installed
from factorllm.engines.process import python_of
from factorllm.hosts import HOSTS, MoeHost, host_of

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed("vllm"), reason="vLLM is not installed; `make test-vllm` installs it"),
    pytest.mark.timeout(900),
]

PROMPTS = 8

HOSTED = [
    ("gqa-tied", "mixtral", "S0A2E8"),
    ("phi3-whole", "granitemoeshared", "S2A2E8"),
    ("granite", "granitemoe", "S0A2E8"),
    ("qwen3", "qwen3_moe", "S0A2E8"),
    ("qwen2", "qwen2_moe", "S2A2E8"),
    ("mha", "qwen2_moe", "S0A2E8"),
    ("qwen3", "glm4_moe", "S2A2E8"),
    ("qwen3", "glm4_moe", "S2A2E8D1"),
    ("glm", "glm4_moe", "S2A2E8"),
    ("smollm3", "granitemoe_swa", "S0A2E8"),
    ("windowed", "granitemoe_swa", "S2A2E8"),
    ("granitemoehybrid", "granitemoehybrid", "S2A2E8"),
    ("lfm2", "lfm2_moe", "S0A2E8"),
    ("gemma4_text", "gemma4_text", "S0A2E8"),
    ("olmo2", "flex_olmo", "S0A2E8"),
    ("cohere", "cohere2_moe", "S1A2E8"),
    ("hunyuan_v1_dense", "hunyuan_v1_moe", "S1A2E8"),
    ("ernie4_5", "ernie4_5_moe", "S0A2E8"),
    ("ernie4_5", "ernie4_5_moe", "S2A2E8"),
]

ON_GPUS = [("nemotron_h", "nemotron_h", "S2A2E8")]
QWEN3_5 = [("qwen3_5_text", "qwen3_5_moe_text", "S0A2E8"), ("qwen3_5_text", "qwen3_5_moe_text", "S2A2E8")]
WRAPPED = {"qwen3_vl_moe_text"}  # vLLM has it inside the vision-language model alone, which is not run here

_WIDTHS = (
    "hidden_size", "intermediate_size", "shared_intermediate_size", "head_dim", "global_head_dim", "mamba_d_head",
    "mamba_head_dim", "linear_key_head_dim", "linear_value_head_dim",
)  # fmt: skip


def wide(name: str) -> PreTrainedConfig:
    """A config four times as wide: vLLM's attention on a CPU wants heads of 32 at least."""
    config = copy.deepcopy({"windowed": SLIDING_WINDOW, "phi3-whole": WHOLE_HEADS, **TINY, **CONFIGS}[name])
    for key in _WIDTHS:
        if width := getattr(config, key, None):
            setattr(config, key, 4 * width)
    if sections := (getattr(config, "rope_parameters", None) or {}).get("mrope_section"):
        config.rope_parameters["mrope_section"] = [4 * section for section in sections]
    return config


def sharpen(folder: Path) -> None:
    """Make the routers what healing with soft gates leaves: gate weights that differ, whose rule matters."""
    config = AutoConfig.from_pretrained(folder)
    shape = (host_of(config).shape(config).experts, config.hidden_size)
    routers = 0
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.shape == shape:
                tensors[name], routers = tensor / FLATTEN, routers + 1
        save_file(tensors, path, metadata={"format": "pt"})
    assert routers == len(ffn_layers(config))


def student(name: str, host: str, recipe: str, tmp_path, text_file, small) -> Path:
    out = factorized(wide(name), tmp_path, text_file, small, recipe, host)
    sharpen(out)
    return out


def disagreement(folder: Path, engine: str = "vllm", dtype: str = "float32", **changes) -> float:
    """The median over prompts of how far an engine is from transformers in fp32: the largest difference of a
    log-probability among the ten likeliest next tokens, or how much less likely than the likeliest one a token is that
    the engine goes on with.

    Args:
        changes: of the config that transformers loads.
    """
    model, found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **changes), []
    with EngineProcess(engine, folder, Options(context=64, dtype=dtype)) as process, torch.no_grad():
        for seed in range(PROMPTS):
            prompt = some_tokens(model.config, rows=1, length=20 + seed, seed=seed)[0].tolist()
            top, said = process.next_tokens(prompt, 10), process.generate(prompt, 8)
            wanted = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            apart = [abs(wanted[0, token].item() - value) for token, value in top]
            behind = [(row.max() - row[token]).item() for row, token in zip(wanted, said, strict=True)]
            found.append(max(apart + behind))
    return median(found)


def test_each_host_is_here():
    hosts = {name for name, host in HOSTS.items() if isinstance(host, MoeHost)}
    assert {host for _, host, _ in HOSTED + ON_GPUS + QWEN3_5} | WRAPPED == {
        host for host in hosts if "vllm" in HOSTS[host].all_engines
    }


@pytest.mark.parametrize(("name", "host", "recipe"), HOSTED)
def test_vllm_agrees_with_transformers(name, host, recipe, tmp_path, text_file, small):
    assert disagreement(student(name, host, recipe, tmp_path, text_file, small)) < 1e-3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="vLLM has experts without a gate on GPUs only")
@pytest.mark.parametrize(("name", "host", "recipe"), ON_GPUS)
def test_vllm_agrees_on_experts_without_a_gate(name, host, recipe, tmp_path, text_file, small):
    assert disagreement(student(name, host, recipe, tmp_path, text_file, small)) < 1e-3


def test_vllm_agrees_on_a_prune_of_layers_that_are_an_ffn_or_not(tmp_path, text_file, small):
    """transformers bounds Mamba's time steps from below, its makers and vLLM do not."""
    out = factorized(wide("nemotron_h"), tmp_path, text_file, small, "S4A0E8")
    assert disagreement(out, time_step_min=0.0) < 1e-3


def test_vllm_sees_one_token_more_of_a_window_of_cohere(tmp_path, text_file, small):
    """On purpose, in its dense Cohere 2 as well. Longer texts than the window differ from transformers."""
    out = student("cohere2", "cohere2_moe", "S1A2E8", tmp_path, text_file, small)
    assert disagreement(out, sliding_window=17) < 1e-3


@pytest.mark.parametrize(("name", "host", "recipe"), QWEN3_5)
def test_vllm_agrees_on_qwen3_5_in_bf16(name, host, recipe, tmp_path, text_file, small):
    """On a CPU vLLM has delta nets in bf16 only. Its model imports torchvision; PyPI has none for a CPU."""
    out = student(name, host, recipe, tmp_path, text_file, small)
    if subprocess.run([python_of("vllm"), "-c", "import torchvision"], capture_output=True).returncode:
        with pytest.raises(FactorLLMError, match="failed to be inspected"):
            EngineProcess("vllm", out, Options(context=64))
        pytest.skip("vLLM loads no Qwen3.5 without torchvision")
    rounding = disagreement(out, "transformers", "bfloat16")
    assert disagreement(out, "vllm", "bfloat16") < 1.5 * rounding


def test_vllm_serves_a_student(tmp_path, text_file, small):
    out, apart = student("lfm2", "lfm2_moe", "S0A2E8", tmp_path, text_file, small), []
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    with served(str(out), "--engine", "vllm", "--context", "64") as (client, log), torch.no_grad():
        assert "without factorllm: vllm serve" in log()
        pieces = client.completions.create(
            model=out.name, prompt="the router", max_tokens=8, stream=True, temperature=0
        )
        assert "".join(piece.choices[0].text for piece in pieces)
        for seed in range(PROMPTS):
            prompt = some_tokens(model.config, rows=1, length=20 + seed, seed=seed)
            answer = client.completions.create(
                model=out.name, prompt=prompt[0].tolist(), max_tokens=1, temperature=0, logprobs=1
            )
            likeliest = model(prompt).logits[0, -1].log_softmax(-1).max().item()
            apart.append(abs(answer.choices[0].logprobs.token_logprobs[0] - likeliest))
    assert median(apart) < 0.1  # the server takes weights of fp32 in bf16
