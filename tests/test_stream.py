import pytest
import torch
from conftest import CONFIGS, relative_error, save_dense, some_tokens

from factorllm.dense import open_model
from factorllm.dense.ends import Ends
from factorllm.dense.layer import LayerLoader
from factorllm.runs.rows import Rows


@pytest.mark.parametrize("name", CONFIGS)
def test_layer_by_layer_equals_the_whole_model(name, tmp_path):
    config = CONFIGS[name]
    model = save_dense(config, tmp_path)
    tokens = some_tokens(config)
    loader = LayerLoader(open_model(str(tmp_path)), tokens.shape[1], torch.float32, torch.device("cpu"))
    stream = Ends(open_model(str(tmp_path)), torch.device("cpu")).embed(tokens)
    with torch.no_grad():
        wanted = model(tokens, output_hidden_states=True).hidden_states
        for index in range(config.num_hidden_layers - 1):
            stream = loader.load(index).forward(stream)
            assert relative_error(stream, wanted[index + 1]) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_in_memory_and_in_a_file_are_the_same(dtype, tmp_path):
    values = torch.randn(10, 4, 3).to(dtype)
    for path in (None, tmp_path / "values.rows"):
        rows = Rows(path, 10, 4, 3, dtype)
        for run in (slice(4, 10), slice(0, 4)):
            rows.write(run, values[run])
        assert torch.equal(rows.read(slice(0, 10)), values)
        assert torch.equal(rows.read(slice(3, 7)), values[3:7])


def test_runs_cover_every_sequence_once(tmp_path):
    rows = Rows(None, 37, 1024, 1, torch.float32)
    covered = [i for run in rows.runs(2, 37) for i in range(run.start, run.stop)]
    assert covered == list(range(2, 37))


def test_a_short_file_is_noticed(tmp_path):
    rows = Rows(tmp_path / "short.rows", 2, 4, 3, torch.float32)
    rows.write(slice(0, 1), torch.zeros(1, 4, 3))
    with pytest.raises(OSError, match="shorter"):
        rows.read(slice(0, 2))
