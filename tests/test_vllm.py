"""vLLM loads each host as it is and agrees with transformers. Run by `make test-vllm`, in whose environment vLLM is."""

from statistics import median

import pytest
from conftest import CONFIGS
from test_export import differences, factorized

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


@pytest.mark.parametrize(("name", "host", "recipe"), HOSTED)
def test_vllm_agrees_with_transformers(name, host, recipe, tmp_path, text_file, small):
    out, dense = factorized(CONFIGS[name], tmp_path, text_file, small, recipe, host), tmp_path / "dense"
    found, allowed = (median(differences(model, model, "vllm", dtype="float32")) for model in (out, dense))
    assert found <= max(1.5 * allowed, 1e-3)
