from types import SimpleNamespace

import pytest
import torch
from conftest import CONFIGS, relative_error, save_dense, some_tokens

from factorllm.convert import task as tasks
from factorllm.convert.task import LayerTask, Streams, Workplace
from factorllm.dense import open_model
from factorllm.dense.ends import Ends
from factorllm.dense.layer import LayerLoader
from factorllm.runs.ranks import Ranks
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


def task_of(sequences, length, ranks=None):
    """A task whose activations of a token are its sequence and its place there."""
    streams = Streams(None, None, Rows(None, sequences, length, 2, torch.float32, ranks), None)
    workplace = Workplace(torch.device("cpu"), ranks, None, 1 << 20, False, 0, lambda _: None)
    layer = SimpleNamespace(ffn=SimpleNamespace(width=2))
    task = LayerTask(layer, streams, None, None, None, torch.Generator(), workplace)
    numbers = torch.meshgrid(torch.arange(float(sequences)), torch.arange(float(length)), indexing="ij")
    task.inputs.write(slice(0, sequences), torch.stack(numbers, dim=-1))
    return task


@pytest.mark.parametrize("tokens", [1, 8, 64, 100, 512, 2048, 8192])
def test_each_place_in_a_sequence_is_sampled_as_often(tokens, monkeypatch):
    """Of 64 sequences of 64 tokens."""
    monkeypatch.setattr(tasks, "_ROUTER_TOKENS", tokens)
    task = task_of(64, 64)
    found = torch.cat([task.tokens(task.inputs, run, sampled=True) for run in task.sample.runs()]).long()
    assert len(found) == 64 * task.sample.length
    assert len(found.unique(dim=0)) == len(found)
    assert (found.T[0].bincount() == task.sample.length).all()
    assert (found.T[1].bincount(minlength=64) == task.sample.length).all()


@pytest.mark.parametrize("index", [0, 1])
def test_a_process_samples_the_sequences_that_are_its_own(index, monkeypatch):
    """Fewer tokens of each, of which more sequences are a batch."""
    monkeypatch.setattr(tasks, "_ROUTER_TOKENS", 195 * 86)
    ranks = SimpleNamespace(count=2, index=index)
    ranks.share = lambda sequences, step: Ranks.share(ranks, sequences, step)
    task = task_of(195, 512, ranks)
    assert task.sample.length < 512
    own, sampled = (
        [number for run in rows.runs() for number in range(run.start, run.stop)] for rows in (task.inputs, task.sample)
    )
    assert sampled == own == list((range(96), range(96, 195))[index])
