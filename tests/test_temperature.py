from types import SimpleNamespace

import pytest
import torch

from factorllm.convert import temperature
from factorllm.convert.temperature import fit_logit_scale, sample_logits
from factorllm.dense.sequences import Sequences
from factorllm.runs.rows import Rows

TEACHER = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))


def test_a_student_that_is_too_sure_is_tempered():
    assert fit_logit_scale(TEACHER, TEACHER * 1.25) == pytest.approx(0.8, abs=0.01)


def test_errors_in_the_logits_make_a_student_less_sure():
    noise = torch.randn(TEACHER.shape, generator=torch.Generator().manual_seed(1))
    slight, strong = (fit_logit_scale(TEACHER, TEACHER + size * noise) for size in (0.5, 2))
    assert strong < slight < 1


def test_an_equal_student_is_left_exactly_as_it_is():
    assert fit_logit_scale(TEACHER, TEACHER) == 1.0


@pytest.mark.parametrize("tokens", [64, 200, 512, 2048])
def test_each_place_in_a_sequence_is_sampled_as_often(tokens, monkeypatch):
    """Of 8192 tokens in sequences of 64, of which half are of the student's kind."""
    monkeypatch.setattr(temperature, "_LOGITS", 10 * tokens)
    stream = Rows(None, 128, 64, 2, torch.float32)
    states = torch.stack(torch.meshgrid(torch.arange(128.0), torch.arange(64.0), indexing="ij"), dim=-1)
    stream.write(slice(0, 128), states)
    sequences, own = Sequences(torch.zeros(128, 64, dtype=torch.long), {}), torch.arange(128) % 4 < 2
    as_they_are = SimpleNamespace(logits=lambda found: found)
    for chosen, total in ((None, 8192), (own, 4096)):
        of_sequence, place = sample_logits(stream, sequences, as_they_are, 10, chosen).long().T
        assert 0.6 * min(tokens, total) <= len(place) <= tokens
        counts = place.bincount(minlength=64)
        assert counts.max() - counts.min() <= 1
        assert chosen is None or chosen[of_sequence].all()
        assert len(of_sequence.unique()) >= min(len(place), 0.9 * total / 64)
