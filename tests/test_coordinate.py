"""The routers' learning rate beside that of all else: measured on steps, brought to balance, the same after a kill."""

import pytest
import torch
from forked import both
from test_heal import MADE_WITH, QUICK, SAME, changed, command, losses, told

from factorllm import FactorLLMError, factorize, heal
from factorllm.healing.coordinate import CHURN, EARLY, KAPPA, CoordinateCallback
from factorllm.healing.trainer import BestCallback

COORDINATED = QUICK.model_copy(update={"coordinate": True, "router_rate": 10.0, "evaluations": 8, "patience": 100})


@pytest.fixture(scope="module")
def student(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "student"
    factorize(str(dense_folder), out, "S0A1E4", text=str(text_file), settings=MADE_WITH)
    return out


@pytest.fixture(scope="module")
def healed(student, dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("healed") / "healed"
    heal(student, str(dense_folder), out, text=str(text_file), settings=COORDINATED)
    return out


def test_kappa_and_churn_are_in_the_curve_and_in_tensorboard(healed):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    curve = [point for point in told(healed)["curve"] if KAPPA in point]
    assert [point["step"] for point in curve] == list(EARLY)
    assert all(0 <= point[CHURN] <= 1 and point[KAPPA] > 0 for point in curve)
    assert max(point[CHURN] for point in curve) > 0
    events = EventAccumulator(str(healed / "runs" / next((healed / "runs").iterdir()).name)).Reload()
    scalars = [event.value for event in events.Scalars(f"train/{KAPPA}")]
    assert scalars == pytest.approx([point[KAPPA] for point in curve])
    assert f"train/{CHURN}" in events.Tags()["scalars"]


def test_a_run_that_was_broken_off_has_the_same_rates(student, healed, dense_folder, text_file, tmp_path):
    evaluated = BestCallback.on_evaluate

    def break_off(callback, arguments, state, control, **more):
        if state.global_step >= 6:
            raise InterruptedError
        return evaluated(callback, arguments, state, control, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BestCallback, "on_evaluate", break_off)
        with pytest.raises(InterruptedError):
            heal(student, str(dense_folder), tmp_path / "broken", text=str(text_file), settings=COORDINATED)
    assert (tmp_path / "broken.partial" / "trainer" / "checkpoint-4").exists()
    heal(student, str(dense_folder), tmp_path / "broken", text=str(text_file), settings=COORDINATED)
    assert told(tmp_path / "broken")["curve"] == told(healed)["curve"]
    assert not changed(tmp_path / "broken", healed)


@pytest.fixture
def rates(monkeypatch):
    """The routers' and the others' rates after each step of the trainings to come."""
    seen = []
    step_end = CoordinateCallback.on_step_end

    def watched(callback, args, state, control, **more):
        weights = [p.detach().clone() for p in more["model"].parameters()]
        step_end(callback, args, state, control, **more)
        assert all(torch.equal(p, before) for p, before in zip(more["model"].parameters(), weights, strict=True))
        seen.append([group["initial_lr"] for group in callback._trainer.lr_scheduler.optimizer.param_groups])

    monkeypatch.setattr(CoordinateCallback, "on_step_end", watched)
    return seen


@pytest.mark.parametrize(("given", "falls"), [(10.0, True), (1e-5, False)])
def test_the_routers_rate_falls_where_they_move_far_and_rises_where_they_do_not(
    given, falls, rates, student, dense_folder, text_file, tmp_path
):
    settings = COORDINATED.model_copy(update={"router_rate": given})
    heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    routers, others = ([pair[i] for pair in rates] for i in (0, 1))
    assert (routers[-1] < 0.5 * routers[0]) == falls
    assert (routers[-1] > routers[0]) == (not falls)
    assert len(set(others)) == 1
    assert len(set(routers)) <= 1 + len(EARLY)


@pytest.mark.slow
def test_two_processes_have_the_rates_of_one(student, dense_folder, text_file, tmp_path):
    options = ["--coordinate", "--router-rate", "10", "--gates", "all-experts"]
    done = both(*command(student, dense_folder, text_file, tmp_path / "two"), *options)
    assert done.returncode == 0, done.stderr
    settings = SAME.model_copy(update={"coordinate": True, "router_rate": 10.0, "gates": "all-experts"})
    heal(student, str(dense_folder), tmp_path / "one", text=str(text_file), settings=settings)
    for name in ("eval_loss", KAPPA, CHURN):
        assert losses(tmp_path / "one", name) == pytest.approx(losses(tmp_path / "two", name), rel=1e-2), name


@pytest.mark.parametrize("changes", [{"coordinate": True}, {"gates": "all-experts"}], ids=str)
def test_routers_that_do_not_learn_are_refused(changes, student, dense_folder, text_file, tmp_path):
    settings = QUICK.model_copy(update={"train": "lora", **changes})
    with pytest.raises(FactorLLMError, match="no router learns with --train lora"):
        heal(student, str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
    factorize(str(dense_folder), tmp_path / "prune", "S4A0E8", text=str(text_file), settings=MADE_WITH)
    settings = QUICK.model_copy(update=changes)
    with pytest.raises(FactorLLMError, match="no router learns in a static prune"):
        heal(tmp_path / "prune", str(dense_folder), tmp_path / "out", text=str(text_file), settings=settings)
