"""vLLM loads each host as it is and agrees with transformers. Run by `make test-vllm`, in whose environment vLLM is."""

from statistics import median

import pytest
import torch
from conftest import CONFIGS, some_tokens
from test_export import PROMPTS, factorized
from transformers import AutoModelForCausalLM

from factorllm.engines import EngineProcess, Options, installed

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


def differences(folder) -> list[float]:
    """For each prompt, the largest difference of a log-probability of the next token among the ten likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with EngineProcess("vllm", folder, Options(context=64, dtype="float32")) as engine, torch.no_grad():
        for seed in range(PROMPTS):
            prompt = some_tokens(model.config, rows=1, length=20 + seed, seed=seed)
            wanted = model(prompt).logits[0, -1].log_softmax(-1)
            top = engine.next_tokens(prompt[0].tolist(), 10)
            found.append(max(abs(wanted[token].item() - value) for token, value in top))
    return found


@pytest.mark.parametrize(("name", "host", "recipe"), HOSTED)
def test_vllm_agrees_with_transformers(name, host, recipe, tmp_path, text_file, small):
    out = factorized(CONFIGS[name], tmp_path, text_file, small, recipe, host)
    assert median(differences(out)) <= max(1.5 * median(differences(tmp_path / "dense")), 1e-3)
