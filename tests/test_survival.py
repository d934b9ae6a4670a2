"""Healing survives: what is injected here ends as a clean run does, or is named and goes on when repeated."""

import errno
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from factorllm import FactorLLMError, factorize
from factorllm.healing import checkpoints as checkpoint_files
from factorllm.healing import failures, targets
from factorllm.healing.checkpoints import checkpoints, read_state
from factorllm.healing.failures import RULES, RestartableError, described, named_failures, retried, rule_of
from factorllm.healing.memory import MicroBatch
from factorllm.healing.run import heal
from factorllm.healing.settings import HealSettings
from factorllm.healing.spikes import Spike, SpikedError, SpikeGuard, Spikes
from factorllm.healing.targets import Targets
from factorllm.healing.trainer import BestCallback, FactorTrainer
from factorllm.runs.settings import Settings

MADE_WITH = Settings(tokens=4096, held_out_tokens=512, length=64, baseline=False)
BATCH = 4
SETTINGS = HealSettings(
    tokens=16_384, validation_tokens=1024, batch=BATCH, micro_batch=BATCH, evaluations=8, learning_rate=5e-4,
    precision="float32",
)  # fmt: skip
POISONED = range(20, 23)  # steps whose batches are poisoned, counted from 1

SHORT = SETTINGS.model_copy(update={"tokens": 4096, "evaluations": 4})

read_item = Targets.__getitem__


@pytest.fixture(scope="module")
def student(dense_folder, text_file, tmp_path_factory):
    out = tmp_path_factory.mktemp("student") / "student"
    factorize(str(dense_folder), out, "S2A2E8", text=str(text_file), settings=MADE_WITH)
    return out


@pytest.fixture(scope="module")
def healing(student, dense_folder, text_file):
    """Heals to a folder, and gives what is told of it."""

    def run(out, settings=SETTINGS) -> dict:
        heal(student, str(dense_folder), out, text=str(text_file), settings=settings)
        return read_told(out)

    return run


def read_told(out) -> dict:
    return json.loads((out / "factorllm.json").read_text())["healing"]


@pytest.fixture(scope="module")
def clean(healing, tmp_path_factory):
    """What is told of a run in which nothing happens, and the sequences in the order that they were trained on."""
    drawn = []

    def recorded(targets: Targets, index: int):
        drawn.extend([index] if targets._part == "train" else [])
        return read_item(targets, index)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Targets, "__getitem__", recorded)
        told = healing(tmp_path_factory.mktemp("clean") / "healed")
    timed = SETTINGS.micro_batch  # those on which the time of a step was measured
    return told, drawn[timed:]


def final(told: dict) -> float:
    """The validation KL of what is kept."""
    return min(point["eval_loss"] for point in told["curve"] if "eval_loss" in point)


@pytest.fixture(scope="module")
def poisoned(clean):
    """In whose block there are batches whose targets are those of no text."""
    sequences = {index for step in POISONED for index in clean[1][BATCH * (step - 1) : BATCH * step]}
    wrong = torch.Generator()

    def poison(targets: Targets, index: int):
        item = read_item(targets, index)
        if targets._part == "train" and index in sequences:
            scores = torch.rand(len(item["top_ids"]), 258, generator=wrong.manual_seed(index))
            item["top_ids"] = scores.argsort(-1)[:, :64].int()
        return item

    @contextmanager
    def block():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Targets, "__getitem__", poison)
            yield patch

    return block


@pytest.fixture(scope="module")
def guarded(poisoned, healing, tmp_path_factory):
    """The output of a run with poisoned batches."""
    out = tmp_path_factory.mktemp("guarded") / "healed"
    with poisoned():
        healing(out)
    return out


def test_poisoned_batches_are_undone_and_left_out(poisoned, guarded, clean, healing, tmp_path):
    told = read_told(guarded)
    assert told["spikes"] == [{"step": 20, "back_to": 16, "first": 20, "last": 22}]
    assert "went back to step 16 and left out the batches of steps 20 to 22" in told["outcome"]
    assert final(told) == pytest.approx(final(clean[0]), rel=0.01)
    with poisoned() as patch:
        patch.setattr(SpikeGuard, "on_step_end", lambda *_, **__: None)
        assert final(healing(tmp_path / "unguarded")) > 1.01 * final(clean[0])


def test_a_run_that_is_broken_off_after_a_spike_ends_with_the_same_bytes(poisoned, guarded, healing, tmp_path):
    evaluated = BestCallback.on_evaluate

    def break_off(callback, arguments, state, control, **more):
        if state.global_step >= 32:
            raise InterruptedError
        return evaluated(callback, arguments, state, control, **more)

    with poisoned() as patch:
        patch.setattr(BestCallback, "on_evaluate", break_off)
        with pytest.raises(InterruptedError):
            healing(tmp_path / "broken")
    with poisoned():
        assert healing(tmp_path / "broken") == read_told(guarded)
    assert_same_weights(tmp_path / "broken", guarded)


def assert_same_weights(*folders):
    one, other = ((folder / "model.safetensors").read_bytes() for folder in folders)
    assert one == other


@pytest.fixture(scope="module")
def short(healing, tmp_path_factory):
    """The output of a run of 16 steps in which nothing happens."""
    out = tmp_path_factory.mktemp("short") / "healed"
    healing(out, SHORT)
    return out


def test_out_of_memory_goes_on_with_smaller_parts_of_the_same_batches(short, healing, tmp_path, monkeypatch):
    """It happens in the second part of a step, when gradients of the broken one are there already."""
    computed, failed = FactorTrainer.compute_loss, []

    def compute_loss(trainer, model, inputs, *arguments, **options):
        loss = computed(trainer, model, inputs, *arguments, **options)
        if trainer.state.global_step >= 5 and len(inputs["input_ids"]) > 1 and len(trainer._step_inputs) == 2:
            loss.backward()
            failed.append(trainer.state.global_step)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return loss

    monkeypatch.setattr(FactorTrainer, "compute_loss", compute_loss)
    told = healing(tmp_path / "out", SHORT.model_copy(update={"micro_batch": 2}))
    assert failed == [5]
    assert len(told["curve"]) == len(read_told(short)["curve"])
    for mine, other in zip(told["curve"], read_told(short)["curve"], strict=True):
        assert mine == pytest.approx(other, rel=1e-3)


def test_out_of_memory_with_one_sequence_is_said(healing, tmp_path, monkeypatch):
    asked = []

    def ask(_, tokens, __):
        asked.append(len(tokens))
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes.")

    monkeypatch.setattr(targets, "ask", ask)
    with pytest.raises(FactorLLMError, match=r"^out of memory .* add --gradient-checkpointing$"):
        healing(tmp_path / "out", SHORT)
    assert asked == [4, 2, 1]


def test_out_of_memory_in_one_of_several_processes_goes_on_so_when_repeated(short, healing, tmp_path):
    """What other processes wait for cannot begin anew in one alone."""
    computed = FactorTrainer.compute_loss

    def compute_loss(trainer, model, inputs, *arguments, **options):
        if trainer.state.global_step >= 5 and len(inputs["input_ids"]) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return computed(trainer, model, inputs, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FactorTrainer, "compute_loss", compute_loss)
        with patch.context() as several:
            several.setattr(FactorTrainer, "begins_anew", False)
            with pytest.raises(RestartableError, match="with fewer sequences at once"):
                healing(tmp_path / "out", SHORT)
        told = healing(tmp_path / "out", SHORT)
    assert final(told) == pytest.approx(final(read_told(short)), rel=1e-3)


def test_a_micro_batch_is_halved_for_good_and_its_parts_are_of_one_size(tmp_path):
    said: list[str] = []
    micro_batch = MicroBatch(tmp_path / "size.json", 6, said.append)
    rows = {"input_ids": torch.arange(12).view(6, 2)}
    assert micro_batch.parts(rows) == [rows]
    assert micro_batch.halve() == 3
    assert said == ["out of memory with 6 sequences at once: 3 from here on, same batches"]
    again = MicroBatch(tmp_path / "size.json", 6, said.append)
    assert [len(part["input_ids"]) for part in again.parts(rows)] == [3, 3]
    assert [len(part["input_ids"]) for part in again.parts({"input_ids": rows["input_ids"][:4]})] == [2, 2]
    assert again.halve() == 1
    assert again.halve() == 0
    assert again.size == 1


def test_a_full_disk_is_said_and_the_repeated_run_ends_with_the_same_bytes(short, healing, tmp_path):
    """The thread that writes meets it."""
    saved, written = checkpoint_files.save_file, []

    def full(tensors, path, **options):
        written.append(path.parent.name)
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved(tensors, path, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint_files, "save_file", full)
        with pytest.raises(FactorLLMError, match=r"no space left on the disk of .*; free some and repeat the command"):
            healing(tmp_path / "out", SHORT)
    assert written == ["checkpoint-4", "checkpoint-8", "checkpoint-12"]
    assert not read_state(tmp_path / "out.partial" / "trainer" / "checkpoint-12")
    assert healing(tmp_path / "out", SHORT) == read_told(short)
    assert_same_weights(tmp_path / "out", short)


def test_a_checkpoint_is_of_the_step_after_which_it_was_begun(tmp_path):
    model = torch.nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, 64)).sum().backward()
    optimizer.step()
    wanted = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: tensor.clone() for name, tensor in optimizer.state_dict()["state"][0].items()}
    writer = checkpoint_files.CheckpointWriter()
    writer.begin(tmp_path, model, optimizer.state_dict())
    writer.wait_for_copy()
    optimizer.step()
    writer.finish()
    found = load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    kept = torch.load(tmp_path / "optimizer.pt", weights_only=True)["state"][0]
    assert all(torch.equal(kept[name], moments[name]) for name in moments)
    assert not torch.equal(model.weight, wanted["weight"])


def test_a_disk_that_does_not_answer_is_asked_again(short, healing, tmp_path, monkeypatch):
    reads, failed = itertools.count(), []

    def unsteady(data: Targets, index: int):
        if next(reads) > 40 and len(failed) < 2:
            failed.append(index)
            raise OSError(errno.EIO, "Input/output error")
        return read_item(data, index)

    monkeypatch.setattr(failures, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(Targets, "__getitem__", unsteady)
    assert healing(tmp_path / "out", SHORT) == read_told(short)
    assert len(failed) == 2
    assert_same_weights(tmp_path / "out", short)


def test_what_may_pass_is_tried_three_times_more_and_nothing_else_is(monkeypatch):
    tried, said = [], []

    def fail(error: Exception):
        tried.append(error)
        raise error

    monkeypatch.setattr(failures, "WAIT_SECONDS", 0.0)
    with pytest.raises(OSError, match="Stale"):
        retried(lambda: fail(OSError(errno.ESTALE, "Stale file handle")), said.append)
    assert len(tried) == 4
    assert said == ["a disk or a network does not answer ([Errno 116] Stale file handle); trying again in 0 s"] * 3
    with pytest.raises(OSError, match="No space"):
        retried(lambda: fail(OSError(errno.ENOSPC, "No space left on device")), said.append)
    assert len(tried) == 5


FAILURES = {
    "no space left on a disk": [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("os error 28")],
    "a file in memory could not be read": [RuntimeError("worker 0 (pid 7) died with exitcode: -7 (SIGBUS)")],
    "a process was killed": [RuntimeError("Signal 9 (SIGKILL) received by PID 4711")],
    "out of memory": [torch.OutOfMemoryError("CUDA out of memory."), MemoryError()],
    "another process of the run is gone": [
        RuntimeError("NCCL error: unhandled system error"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:4711"),
        torch.distributed.DistNetworkError("The client socket has timed out"),
    ],
    "a disk or a network does not answer": [OSError(errno.ESTALE, "Stale file handle"), RuntimeError("(os error 5)")],
    "a type of number does not fit": [
        RuntimeError("expected m1 and m2 to have the same dtype, but got: float"),
        RuntimeError("Index put requires the source and destination dtypes match, got Float"),
        RuntimeError("expected scalar type Float but found BFloat16"),
        RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'"),
    ],
    "shapes of tensors do not fit": [
        RuntimeError("mat1 and mat2 shapes cannot be multiplied (2x3 and 4x5)"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
    ],
    "a file is gone": [FileNotFoundError(errno.ENOENT, "No such file or directory", "targets/train-00000.safetensors")],
    "a JSON file of the run is damaged": [json.JSONDecodeError("Expecting value", "{", 1)],
    "the tokenizer cannot be used": [
        ValueError("Couldn't instantiate the backend tokenizer from one of: (1) a `tokenizers` library file"),
        OSError("Can't load tokenizer for 'dense'. If you were trying to load it from the hub"),
        ValueError("Tokenizer class NoSuch does not exist or is not currently imported."),
    ],
}


@pytest.mark.parametrize(("name", "error"), [(name, error) for name, errors in FAILURES.items() for error in errors])
def test_every_failure_is_named_with_what_to_do(name, error):
    def fail():
        raise error

    rule = rule_of(described(error))
    assert rule.name == name
    with pytest.raises(type(error) if rule.action == "fault" else FactorLLMError) as raised, named_failures():
        fail()
    if rule.action == "fault":
        assert raised.value.__notes__ == [f"{name}: {rule.hint}"]
    else:
        assert str(raised.value).startswith(f"{name} (")
        assert str(raised.value).endswith(f"; {rule.hint}")


def test_the_cause_of_an_error_names_it_and_what_no_rule_knows_passes():
    error = RuntimeError("the checkpoint could not be written")
    error.__cause__ = OSError(errno.EDQUOT, "Disk quota exceeded")
    assert rule_of(described(error)).name == "no space left on a disk"
    assert {rule.name for rule in RULES} == set(FAILURES)
    for own in (
        KeyError("our own fault"),
        AttributeError("'NoneType' object has no attribute 'dtype'"),
        TypeError("heal() got an unexpected keyword argument 'tokenizer'"),
    ):
        with pytest.raises(type(own)), named_failures():
            raise own


def write_checkpoint(folder, step: int, validation: list[float]) -> None:
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    history = [{"eval_loss": loss} for loss in validation]
    (path / "trainer_state.json").write_text(json.dumps({"log_history": history}))


def test_from_the_second_spike_on_the_rate_is_halved_and_all_since_the_checkpoint_is_left_out(tmp_path):
    folder = tmp_path / "trainer"
    for step, loss in {10: 0.9, 20: 0.8, 30: 3.0}.items():  # the last one saw it already
        write_checkpoint(folder, step, [1.0, loss])
    spikes = Spikes(tmp_path / "spikes.json")
    assert spikes.undo(SpikedError(35, 37), folder) == Spike(35, 20, 35, 37)
    assert list(checkpoints(folder)) == [10, 20]
    assert spikes.halvings == 0
    assert spikes.undo(SpikedError(25, 27), folder) == Spike(25, 20, 21, 27)
    assert spikes.left_out == {*range(21, 28), *range(35, 38)}
    assert Spikes(tmp_path / "spikes.json").found == spikes.found

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    before = SpikeGuard(Spikes(tmp_path / "none.json"), lambda: 1.0).state()  # as the checkpoint has it
    state = SimpleNamespace(stateful_callbacks={"SpikeGuard": before})
    guard = SpikeGuard(spikes, lambda: 1.0)
    guard.on_train_begin(None, state, None, optimizer=optimizer, lr_scheduler=schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.05)
    optimizer.step()
    schedule.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)
    state.stateful_callbacks["SpikeGuard"] = guard.state()  # of a later checkpoint, which has it already
    guard.on_train_begin(None, state, None, optimizer=optimizer, lr_scheduler=schedule)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def spiked_at(losses: list[float], tmp_path) -> int | None:
    """The step after which training goes back."""
    given = iter(losses)
    guard = SpikeGuard(Spikes(tmp_path / "spikes.json"), lambda: next(given))
    for step in range(1, len(losses) + 1):
        try:
            guard.on_step_end(None, SimpleNamespace(global_step=step), None)
        except SpikedError as spiked:
            return spiked.last
    return None


def test_three_losses_far_off_are_a_spike(tmp_path):
    usual = [1.0, 1.1, 0.9, 1.05] * 16
    assert spiked_at([*usual, 2.0, 2.0, 2.0], tmp_path) == 67
    assert spiked_at([*usual, 2.0, 2.0, 1.0, 2.0], tmp_path) is None
    assert spiked_at([*usual, 1.2, 1.2, 1.2], tmp_path) is None
    assert spiked_at([*usual, math.nan, math.inf, math.nan], tmp_path) == 67
    assert spiked_at([*[1.0] * 64, 1.01, 1.01, 1.01], tmp_path) is None  # batches that are all alike
    assert spiked_at([1.0, 1.1, 5.0, 5.0, 5.0, 5.0], tmp_path) is None  # too few to know


def supervised(student, dense_folder, text_file, out) -> subprocess.Popen:
    """`SHORT` in two processes under the agent."""
    words = ["heal", student, "--teacher", dense_folder, "--text", text_file, "-o", out, "--supervise", "2"]
    options = {"--tokens": SHORT.tokens, "--batch": BATCH, "--learning-rate": SHORT.learning_rate}
    words += [*itertools.chain(*options.items()), "--precision", "float32"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "factorllm", *map(str, words)], env=environment)


def second_of(agent: subprocess.Popen) -> psutil.Process:
    """The process of rank 1."""
    return next(each for each in psutil.Process(agent.pid).children() if each.environ().get("RANK") == "1")


@pytest.mark.slow
@pytest.mark.timeout(1200)  # three runs and a hang, on a machine that may be busy
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_one_of_two_processes_that_is_killed_or_stopped_is_started_again(
    how, healing, student, dense_folder, text_file, tmp_path
):
    more = {"validation_tokens": HealSettings().validation_tokens, "evaluations": HealSettings().evaluations}
    clean = healing(tmp_path / "clean", SHORT.model_copy(update=more))
    agent = supervised(student, dense_folder, text_file, tmp_path / "out")
    trainer = tmp_path / "out.partial" / "trainer"
    while not any(map(read_state, trainer.glob("checkpoint-4"))):  # steps are timed by then
        assert agent.poll() is None, "the run ended before it could be hurt"
        time.sleep(0.01)
    hurt = second_of(agent)
    hurt.send_signal(how)
    logs = []
    while agent.poll() is None:
        logs += [path.read_text() for path in tmp_path.glob("out.partial/hang-0.log")]
        time.sleep(0.2)
    assert agent.returncode == 0
    assert not hurt.is_running()
    assert final(read_told(tmp_path / "out")) == pytest.approx(final(clean), rel=0.01)
    assert any("Timeout" in log for log in logs) == (how == signal.SIGSTOP)


@pytest.mark.slow
def test_what_is_refused_is_not_started_again(student, dense_folder, text_file, tmp_path):
    words = ["heal", student, "--teacher", tmp_path / "none", "-o", tmp_path / "out", "--supervise", "1"]
    ended = subprocess.run([sys.executable, "-m", "factorllm", *map(str, words)], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.count("error: ") == 1
