"""The steps of a plan, each of which goes on where it was killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from factorllm.convert.factorize import factorize
from factorllm.dense import open_model
from factorllm.exporting import export_gguf
from factorllm.healing.run import heal
from factorllm.making.card import write_card
from factorllm.making.modelfile import write_modelfile
from factorllm.making.place import Place
from factorllm.making.plan_file import MakePlan
from factorllm.measure.front.run import NUMBERS, run_front
from factorllm.measure.scores import evaluate
from factorllm.measure.speed.run import run_bench
from factorllm.recipe import parse_recipe
from factorllm.report.findings import gather
from factorllm.report.page import PAGE, check_report_folder, write_report
from factorllm.runs.digest import digest_of
from factorllm.runs.identity import versions
from factorllm.runs.output import read_json
from factorllm.runs.workspace import write_json
from factorllm.text.calibration import text_identity
from factorllm.text.sample import sample
from factorllm.trimming import COUNTED_TOKENS
from factorllm.trimming.trim import trim


@dataclass(frozen=True)
class Step:
    """A part of the work.

    Attributes:
        leaves: files that are there when it is done, without which what it made is of no use.
        key: what decides its result, beside the steps before.
        run: does it; called again after it was killed, it goes on.
    """

    name: str
    leaves: tuple[Path, ...]
    key: Any
    run: Callable[[], object]


class Work:
    """A plan, carried out in a folder."""

    def __init__(self, plan: MakePlan, out: Path, console: Console):
        self.plan, self.at, self.console = plan, Place(out, plan), console
        self._text = plan.text or str(self.at.sampled)
        self._converted = self.at.converted if plan.heal else self.at.checkpoint
        # What is unfinished, of the same plan, goes on; what an older plan left there is replaced.
        self._again: dict[str, Any] = {"overwrite": True, "console": console}

    def steps(self) -> list[Step]:
        """All steps, in their order."""
        plan, at, said = self.plan, self.at, self.plan.model_dump(mode="json")
        text = text_identity(plan.text)
        # Where it is written decides too: what is healed takes the place of what was not.
        converts = {
            "recipe": parse_recipe(plan.recipe).model_dump(),
            "settings": said["factorize"],
            "text": text,
            "folder": self._converted.name,
        }
        samples = {"how": said["sample"], **{name: said["factorize"][name] for name in ("length", "seed", "device")}}
        trims = {"vocabulary": plan.vocabulary, "settings": said["factorize"], "text": text}
        found = [
            Step("sample", (at.sampled,), samples, self._sample) if plan.text is None else None,
            Step("trim", (at.trimmed / "config.json",), trims, self._trim) if plan.vocabulary else None,
            Step("factorize", (self._converted / "config.json",), converts, self._factorize),
            Step("heal", (at.checkpoint / "config.json",), said["heal"], self._heal) if plan.heal else None,
            Step("export", (at.gguf,), said["export"], self._export),
            Step("eval", (at.scores,), said["evaluate"], self._evaluate),
            Step("bench", (at.timed,), said["bench"], self._bench) if plan.bench else None,
            Step("front", (at.front / NUMBERS,), said["front"], self._front) if plan.front else None,
            Step("report", (at.out / "report" / PAGE,), None, self._report),
            Step("card", (at.out / "README.md", at.out / "Modelfile"), None, self._card),
        ]
        return [step for step in found if step is not None]

    def _sample(self) -> None:
        assert self.plan.sample  # a plan without a text has it
        settings = self.plan.factorize.model_copy(update={"tokens": self.plan.sample.tokens})
        how = self.plan.sample.model_dump(include={"chat", "temperature"})
        sample(self.plan.model, self.at.sampled, settings=settings, **how, **self._again)

    def _trim(self) -> None:
        plan = self.plan
        assert plan.vocabulary  # there is no such step without
        assert plan.text
        settings = plan.factorize.model_copy(update={"tokens": COUNTED_TOKENS})
        trim(plan.model, self.at.trimmed, plan.vocabulary, plan.text, settings=settings, **self._again)

    def _factorize(self) -> None:
        plan = self.plan
        factorize(self.at.dense, self._converted, plan.recipe, text=self._text, settings=plan.factorize, **self._again)

    def _heal(self) -> None:
        plan = self.plan
        heal(self._converted, self.at.dense, self.at.checkpoint, text=self._text, settings=plan.heal, **self._again)

    def _export(self) -> None:
        how = self.plan.export
        weighed = {"text": self._text, "gptq": how.gptq} if how.weighed or how.gptq else {}
        say = partial(self.console.print, soft_wrap=True, highlight=False, markup=False)
        export_gguf(str(self.at.checkpoint), self.at.gguf, how.type, say=say, **weighed, **self._again)

    def _evaluate(self) -> None:
        measured = {"text": self._text, "settings": self.plan.evaluate, "console": self.console}
        write_json(self.at.scores, asdict(evaluate(self.at.checkpoint, against=self.at.dense, **measured)))

    def _bench(self) -> None:
        plan = self.plan
        timed = (plan.engine, plan.export.type, plan.bench, self.at.speed, self.console)
        run_bench(str(self.at.checkpoint), [plan.model], *timed)

    def _front(self) -> None:
        models = [str(self.at.checkpoint)], [self.plan.model]
        run_front(*models, self._text, self.at.front, self.plan.front, console=self.console)

    def _report(self) -> None:
        folder = self.at.out / "report"
        check_report_folder(folder)
        at, device = self.at, self.plan.evaluate.device
        found = gather(at.checkpoint, at.dense, at.measured(), device, self.console)
        write_report(at.out.name, found, folder)

    def _card(self) -> None:
        write_modelfile(self.at.gguf, self.at.out)
        write_card(self.at)


class Progress:
    """Which steps are done, kept on disk. A step is to be done again where its plan, one before it, or the dense model
    changed, or what it left is gone."""

    def __init__(self, work: Work, steps: list[Step]):
        self._path = work.at.steps / "done.json"
        self._done: dict[str, str] = read_json(self._path) or {}
        source = open_model(work.plan.model)
        self._keys, so_far = {}, json.dumps([source.fingerprint, source.surroundings, versions()])
        for step in steps:
            so_far = digest_of((), json.dumps([so_far, step.name, step.key], sort_keys=True).encode())
            self._keys[step.name] = so_far

    def is_done(self, step: Step) -> bool:
        return all(path.exists() for path in step.leaves) and self._done.get(step.name) == self._keys[step.name]

    def begin(self, step: Step) -> None:
        """Forget what was done of a step, and of those that the plan has no more, before what they left is replaced."""
        gone = {step.name, *(self._done.keys() - self._keys.keys())}
        self._done = {name: key for name, key in self._done.items() if name not in gone}
        write_json(self._path, self._done)

    def mark(self, step: Step) -> None:
        self._done[step.name] = self._keys[step.name]
        write_json(self._path, self._done)
