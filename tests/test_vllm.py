"""vLLM loads each host as it is and agrees with transformers. Run by `make test-vllm`, in whose environment vLLM is."""

import copy
from statistics import median

import pytest
from conftest import CONFIGS, served
from test_export import differences, factorized
from transformers import PreTrainedConfig

from factorllm.engines import installed

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(not installed("vllm"), reason="vLLM is not installed; `make test-vllm` installs it"),
    pytest.mark.timeout(900),
]

HOSTED = [
    ("gqa-tied", "mixtral", "S0A2E4"),
    ("gqa-tied", "granitemoeshared", "S2A2E8"),
    ("qwen2", "qwen2_moe", "S2A2E8"),
    ("mha", "qwen2_moe", "S0A2E4"),
    ("qwen3", "qwen3_moe", "S0A2E4"),
    ("qwen3", "glm4_moe", "S2A2E8"),
    ("gqa-tied", "glm4_moe", "S2A2E8"),
]


def wide(name: str) -> PreTrainedConfig:
    """A config with heads of 32: vLLM's attention on a CPU wants no smaller ones."""
    config = copy.deepcopy(CONFIGS[name])
    config.hidden_size, config.intermediate_size, config.head_dim = 128, 256, 32
    return config


@pytest.mark.parametrize(("name", "host", "recipe"), HOSTED)
def test_vllm_agrees_with_transformers(name, host, recipe, tmp_path, text_file, small):
    out, dense = factorized(wide(name), tmp_path, text_file, small, recipe, host), tmp_path / "dense"
    found, allowed = (median(differences(model, model, "vllm", dtype="float32")) for model in (out, dense))
    assert found <= max(1.5 * allowed, 1e-3)


def test_vllm_serves_a_student(tmp_path, text_file, small):
    out = factorized(wide("gqa-tied"), tmp_path, text_file, small, "S2A2E8", "granitemoeshared")
    with served(str(out), "--engine", "vllm", "--context", "64") as (client, log):
        assert "without factorllm: vllm serve" in log()
        pieces = client.completions.create(
            model=out.name, prompt="the router", max_tokens=8, stream=True, temperature=0
        )
        said = "".join(piece.choices[0].text for piece in pieces)
    assert said
