import pytest
import torch

from factorllm.convert.temperature import fit_logit_scale

TEACHER = 3 * torch.randn(200, 50, generator=torch.Generator().manual_seed(0))


def test_a_student_that_is_too_sure_is_tempered():
    assert fit_logit_scale(TEACHER, TEACHER * 1.25) == pytest.approx(0.8, abs=0.01)


def test_errors_in_the_logits_make_a_student_less_sure():
    noise = torch.randn(TEACHER.shape, generator=torch.Generator().manual_seed(1))
    slight, strong = (fit_logit_scale(TEACHER, TEACHER + size * noise) for size in (0.5, 2))
    assert strong < slight < 1


def test_an_equal_student_is_left_exactly_as_it_is():
    assert fit_logit_scale(TEACHER, TEACHER) == 1.0
