"""A chain of questions, as its YAML file says."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import permutations
from math import perm
from pathlib import Path
from typing import Annotated, Any

import yaml
from jinja2 import StrictUndefined, Template
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from factorllm.errors import FactorLLMError, first_problem, refusing
from factorllm.text.documents import json_lines, whole_characters

BUILT_IN = ("emotion-cause",)
"""Chains that come with the package."""

_MOST_CHOICES = 1000
_LONGEST = 100  # characters of an answer
_RESERVED = ("before", "gold")
_AND = ", "  # between the answers of one line
_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


@dataclass(frozen=True)
class Question:
    """What a model is asked.

    Attributes:
        prompt: ends without a space; the answer follows after one, and a line break ends it.
        allowed: the answers that it may give, or the tokens that a line of its own words may have.
    """

    prompt: str
    allowed: tuple[str, ...] | int


class Step(BaseModel):
    """A question, asked of each thread that is left of each document."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name
    """What later prompts call its answer."""
    prompt: str
    """A jinja2 template of the document's keys, of earlier answers, and of `before`: the prompt and answer before."""
    answers: tuple[str, ...] | str | None = None
    """What may be answered: texts, or the key of each document that holds them."""
    most: int = Field(default=1, ge=1, le=4)
    """Answers in one line, each of which the chain follows by itself."""
    prune: str | None = None
    """One more answer that may be given, after which the thread is dropped."""
    tokens: int | None = Field(default=None, ge=1, le=256)
    """Instead of `answers`: tokens that a line of the model's own words may have."""

    @model_validator(mode="after")
    def _is_one_of_both(self) -> Step:
        if (self.answers is None) == (self.tokens is None):
            raise ValueError("give either `answers`, to choose from, or `tokens`, for a line of the model's own words")
        if self.tokens and (self.prune or self.most > 1):
            raise ValueError("`prune` and `most` are of a step with `answers`")
        return self

    @cached_property
    def _template(self) -> Template:
        return _JINJA.from_string(self.prompt)

    def ask(self, known: Mapping[str, Any]) -> Question:
        """The question to a document of which earlier answers are `known`.

        Raises:
            FactorLLMError: when the template or the answers cannot be used.
        """
        with refusing(f"the prompt of step {self.name}", "mend it; it sees a document's keys and earlier answers"):
            prompt = whole_characters(self._template.render(known)).rstrip()
        if not prompt:
            raise FactorLLMError(f"the prompt of step {self.name} is empty; write what the model is to read")
        return Question(prompt, self.tokens or self._choices(known))

    def follow(self, answer: str) -> list[str]:
        """The threads that an answer leads to."""
        return [] if answer == self.prune else answer.split(_AND) if self.most > 1 else [answer]

    def same(self, one: str, other: str) -> bool:
        """Whether two answers say the same, in whatever order."""
        return set(self.follow(one)) == set(self.follow(other))

    def _choices(self, known: Mapping[str, Any]) -> tuple[str, ...]:
        single = known.get(self.answers) if isinstance(self.answers, str) else self.answers
        if isinstance(self.answers, str) and not isinstance(single, list):
            raise FactorLLMError(f"step {self.name}: a document has no list of answers under {self.answers!r}; add it")
        single = tuple(single)  # type: ignore[arg-type]
        whole = (*single, self.prune) if self.prune is not None else single
        if wrong := _wrong(whole, self.most):
            raise FactorLLMError(f"step {self.name}: {wrong}; mend `answers`")
        lines = sum(perm(len(single), n) for n in range(1, self.most + 1))
        if lines > _MOST_CHOICES:
            raise FactorLLMError(
                f"step {self.name}: {len(single)} answers, up to {self.most} of them in a line, make {lines} lines, "
                f"more than the {_MOST_CHOICES} that are told apart; lower `most`, or give fewer answers"
            )
        found = [_AND.join(some) for n in range(1, self.most + 1) for some in permutations(single, n)]
        return tuple(found if self.prune is None else [*found, self.prune])


def _wrong(answers: tuple[Any, ...], most: int) -> str | None:
    if len(answers) < 2:
        return "there is no choice between fewer than two answers"
    for text in answers:
        if not isinstance(text, str) or not text.isprintable() or text != text.strip() or not text:
            return f"{text!r} is no text of one line without spaces round it"
        if len(text) > _LONGEST:
            return f"{text[:40]!r} has {len(text)} characters, more than {_LONGEST}"
        if whole_characters(text) != text:
            return f"{text!r} holds half a character"
        if most > 1 and _AND.strip() in text:
            return f"{text!r} holds a comma, which stands between several answers"
    return "an answer stands there twice" if len(set(answers)) < len(answers) else None


class _File(BaseModel):
    """The YAML file of a chain."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    documents: str | tuple[dict[str, Any], ...]
    result: Annotated[tuple[str, ...], Field(min_length=1)]
    steps: Annotated[tuple[Step, ...], Field(min_length=1)]

    @model_validator(mode="after")
    def _is_consistent(self) -> _File:
        names = [step.name for step in self.steps]
        if len(set(names)) < len(names) or set(names) & set(_RESERVED):
            raise ValueError(f"each step needs a name of its own, and none of {', '.join(_RESERVED)}")
        if missing := set(self.result) - set(names):
            raise ValueError(f"`result` names {', '.join(sorted(missing))}, which is no step")
        return self


@dataclass(frozen=True)
class Chain:
    """A chain with its documents.

    Attributes:
        name: of its file, or of those that are built in.
        documents: each with its keys, and `gold`: lists of the right answers to the steps of `result`.
        result: the steps whose answers make what is found in a document.
    """

    name: str
    documents: tuple[dict[str, Any], ...]
    steps: tuple[Step, ...]
    result: tuple[str, ...]


def read_chain(chain: str | Path) -> Chain:
    """Read a chain.

    Args:
        chain: one of `BUILT_IN`, or the path of a YAML file; its `documents` are records in it, or the path of a
            JSONL file, seen from its folder.

    Raises:
        FactorLLMError: for a file that is none, naming the key; for documents that a step cannot be asked of.
    """
    built_in = Path(str(files("factorllm.measure.chain"))) / f"{chain}.yaml"
    path = built_in if str(chain) in BUILT_IN else Path(chain)
    with refusing(path, f"give the YAML file of a chain, or one of those that come along: {', '.join(BUILT_IN)}"):
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise FactorLLMError(f"{path} holds no keys such as `documents:` and `steps:`; write them")
    try:
        file = _File(**content)
    except ValidationError as error:
        raise FactorLLMError(f"{path}: {first_problem(error)}; mend it there") from None
    except TypeError:
        raise FactorLLMError(f"{path}: its keys are no texts; mend it there") from None
    documents = file.documents
    if isinstance(documents, str):
        documents = tuple(record for _, record in json_lines(path.parent / documents))
    found = Chain(path.stem, documents, file.steps, file.result)
    _check(found, path)
    return found


def _check(chain: Chain, path: Path) -> None:
    """Ask everything once of nobody, so that nothing is refused after an hour of answers."""
    if not chain.documents:
        raise FactorLLMError(f"{path} has no documents; add some")
    for number, document in enumerate(chain.documents, 1):
        where = f"{path}: document {number}"
        if not isinstance(document, dict) or not _is_gold(document.get("gold"), len(chain.result)):
            raise FactorLLMError(
                f"{where} has no `gold`, a list of lists with one text for each of {', '.join(chain.result)}; add it"
            )
        known = document | {"before": ""}
        for step in chain.steps:
            if step.name in document:
                raise FactorLLMError(f"{where} has a key {step.name!r}, the name of a step; rename one of them")
            try:
                allowed = step.ask(known).allowed
            except FactorLLMError as error:
                raise FactorLLMError(f"{where}: {error}") from None
            known[step.name] = allowed[0] if isinstance(allowed, tuple) else ""


def _is_gold(gold: object, length: int) -> bool:
    return isinstance(gold, list) and all(
        isinstance(found, list) and len(found) == length and all(isinstance(text, str) for text in found)
        for found in gold
    )
