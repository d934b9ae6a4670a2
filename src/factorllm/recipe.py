"""Recipe: what to build. Parses `S2A2E8`, `1R4E2K`, `cmoe` and YAML files, and refuses what cannot be, saying why."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Literal

import yaml
from pydantic import Field, ValidationError, model_validator

from factorllm.errors import FactorLLMError
from factorllm.runs.given import given
from factorllm.runs.settings import Chosen

_CMOE = re.compile(r"S(\d+)A(\d+)E(\d+)(?:N(\d+))?(?:D(\d+))?", re.IGNORECASE)
_PAPER = re.compile(r"(\d+)R(\d+)E(\d+)K", re.IGNORECASE)
_READ_ME = re.compile(r"read-me:K(\d+)(?::(.+))?", re.IGNORECASE)

PartitionName = Literal["energy", "activation", "coactivation", "kmeans", "contiguous", "random"]
RouterName = Literal["refined", "pa", "analytic", "random"]
PriorName = Literal["energy", "paper"]
RestoreName = Literal["stream", "local", "none"]

LITERATURE: dict[str, tuple[str, dict[str, str]]] = {
    "llama-moe": ("S0A4E8", {"partition": "random", "router": "pa"}),
    "moefication": ("S0A4E8", {"partition": "coactivation", "router": "pa"}),
    "cmoe": ("S2A2E8", {"partition": "activation", "router": "analytic"}),
    "factorllm-paper": ("1R4E2K", {"partition": "random", "router": "pa", "prior": "paper"}),
}
"""Published methods: their shape at 50 % FFN sparsity, and how they split and route.

LLaMA-MoE (arXiv 2406.16554) trains its router in continued pre-training and MoEfication (arXiv 2110.01786) fits a small
network; here both have a linear router, as the hosts do. CMoE is arXiv 2502.04416, FactorLLM arXiv 2408.11855. All take
our restore, which none of them has, unless a YAML file says `restore: none`."""


@dataclass(frozen=True)
class Shape:
    """How FFNs are cut: a shared part and routed experts of equal width.

    Attributes:
        ffn_width: neurons of the dense FFN, f.
        shared_width: neurons that run for every token.
        experts: number of routed experts, N; 0 in a static prune.
        expert_width: neurons of one routed expert.
        top_k: routed experts that run for a token, k.
        leading_dense: first layers of the model whose FFN is not cut.

    Example:
        >>> shape = Shape(ffn_width=1536, shared_width=384, experts=6, expert_width=192, top_k=2)
        >>> shape.active_width, shape.sparsity
        (768, 0.5)
    """

    ffn_width: int
    shared_width: int
    experts: int
    expert_width: int
    top_k: int
    leading_dense: int = 0

    @property
    def kept_width(self) -> int:
        """FFN neurons in the checkpoint: all of them; fewer in a static prune, more where experts overlap."""
        return self.shared_width + self.experts * self.expert_width

    @property
    def overlaps(self) -> bool:
        """Whether experts share neurons, each with a copy of its own."""
        return self.kept_width > self.ffn_width

    @property
    def active_width(self) -> int:
        """FFN neurons that run for one token."""
        return self.shared_width + self.top_k * self.expert_width

    @property
    def shared_columns(self) -> slice:
        """Where the shared part is among the kept neurons, which are in the order shared, expert 0, expert 1, ..."""
        return slice(0, self.shared_width)

    def expert_columns(self) -> list[slice]:
        """Where each routed expert is among the kept neurons."""
        starts = range(self.shared_width, self.kept_width, self.expert_width) if self.experts else ()
        return [slice(start, start + self.expert_width) for start in starts]

    @property
    def sparsity(self) -> float:
        """FFN sparsity: the share of FFN neurons that do not run for a token."""
        return 1 - self.active_width / self.ffn_width


_HALF = "S4A0E8"  # of each FFN, for each kind of text
MOST_KINDS = 64
"""Of text, that a prune each is made for."""

_BLOCKS = (32, 16, 8)  # what llama.cpp quantises in; else, what is aligned in memory


class Recipe(Chosen):
    """What to build from each FFN. Unknown keys are refused.

    The FFN is cut into `parts` equal parts: `shared` of them always run, the other `parts - shared` are routed
    experts of which `active` run for a token. With `overlapping`, a token runs one of so many routed experts, each as
    wide as `active` parts, and a neuron may be in several of them. The FFNs of the first `dense` layers stay whole.

    Example:
        >>> Recipe(shared=2, active=2, parts=8, partition="kmeans").shape(1536).top_k
        2
    """

    shared: int = Field(ge=0)
    """Parts that run for every token (the shared expert)."""
    active: int = Field(ge=0)
    """Routed experts that run for a token: top-k. 0 keeps only the shared part: a static prune."""
    parts: int = Field(ge=1)
    """Equal parts that the FFN is cut into."""
    overlapping: int | None = Field(default=None, ge=2)
    """Routed experts that may share neurons. They take more memory than the dense FFN, and run no more of it."""
    dense: int = Field(default=0, ge=0)
    """First layers whose FFN stays whole: what is left out there costs the most."""
    partition: PartitionName = "energy"
    """How neurons are grouped into experts."""
    router: RouterName = "refined"
    """How the router is made: fitted by the Prior-Approximate loss and refined on the restored student's error (where a
    token's experts are one of at most 512 sets; of more, only fitted), fitted by that loss alone, analytic (CMoE), or
    random."""
    prior: PriorName = "energy"
    """What the dense FFN says about which experts matter: contribution energy, or the paper's distance to F/r."""
    restore: RestoreName = "stream"
    """Target of the closed-form repair of down_proj: the teacher's stream, the dense FFN's output, or no repair."""

    @model_validator(mode="after")
    def _possible(self) -> Recipe:
        if self.shared > self.parts:
            raise ValueError(f"{self.shared} shared of {self.parts} parts is more than there are")
        routed = self.parts - self.shared
        if self.active > routed:
            raise ValueError(
                f"{self.active} active experts, but only {routed} of the {self.parts} parts are routed "
                f"({self.shared} are shared); use at most {routed}"
            )
        if self.shared + self.active == 0:
            raise ValueError("no part of the FFN would run; make at least one part shared or active")
        if self.dense and self.is_prune:
            raise ValueError(
                "in a static prune all FFNs are of one width; make at least one part active, or leave D out"
            )
        if self.partition != "energy" and self.is_prune:
            raise ValueError(
                f"a static prune keeps the neurons of most energy, not what partition {self.partition} would choose; "
                "leave the partition out, or make at least one part active"
            )
        if self.overlapping:
            self._check_overlapping(self.overlapping, routed)
        return self

    def _check_overlapping(self, experts: int, routed: int) -> None:
        if self.is_prune:
            raise ValueError("a static prune has no experts that could overlap; make at least one part active")
        if experts * self.active <= routed:
            raise ValueError(
                f"{experts} experts of {self.active} of {routed} routed parts need not overlap; use at least "
                f"{routed // self.active + 1}, or leave the N out"
            )
        if self.partition != "energy":
            raise ValueError(f"experts of partition {self.partition} share no neurons; only those of energy overlap")

    @property
    def experts(self) -> int:
        """Routed experts, N."""
        return self.overlapping or self.parts - self.shared

    @property
    def top_k(self) -> int:
        """Routed experts that run for a token, k."""
        return 1 if self.overlapping else self.active

    @property
    def is_prune(self) -> bool:
        """True when no expert is routed: the student is a narrower dense model."""
        return self.active == 0

    @property
    def name(self) -> str:
        counts = {"S": self.shared, "A": self.active, "E": self.parts, "N": self.overlapping, "D": self.dense}
        return "".join(f"{key}{count}" for key, count in counts.items() if count or key in "SAE")

    def static_prune(self) -> Recipe:
        """The static prune with the same active parameters in each FFN that is cut: the baseline of every table."""
        return Recipe(shared=self.shared + self.active, active=0, parts=self.parts, restore=self.restore)

    def shape(self, ffn_width: int) -> Shape:
        """Widths for an FFN of `ffn_width` neurons.

        Raises:
            FactorLLMError: when the parts do not divide the FFN.
        """
        if ffn_width % self.parts:
            fits = [n for n in range(2, 65) if ffn_width % n == 0]
            raise FactorLLMError(
                f"{self.name} cuts the FFN into {self.parts} equal parts, but its {ffn_width} neurons do not divide "
                f"by {self.parts}; part counts that do: {', '.join(map(str, fits)) or 'none up to 64'}"
            )
        width = ffn_width // self.parts
        experts = 0 if self.is_prune else self.experts
        expert_width = width * self.active if self.overlapping else width
        return Shape(ffn_width, self.shared * width, experts, expert_width, self.top_k, self.dense)


def parse_recipe(text: str | Path) -> Recipe:
    """Read a recipe: `S2A2E8` (CMoE's notation), `S0A4E8N3` (the same with 3 experts that overlap), `S2A2E8D1` (the
    first layer's FFN stays whole), `1R4E2K` (the paper's), the path of a YAML file, or a published method of
    `LITERATURE`, alone or with another shape: `cmoe`, `cmoe:S3A3E8`.

    Raises:
        FactorLLMError: when the text is none of these, or says something that cannot be built.

    Example:
        >>> recipe = parse_recipe("S2A2E8")
        >>> recipe.shared, recipe.active, recipe.parts
        (2, 2, 8)
    """
    text = given(text)
    method, _, shape = text.partition(":")
    try:
        if method in LITERATURE:
            usual, fields = LITERATURE[method]
            return Recipe(**parse_recipe(shape or usual).model_dump() | fields)
        if match := _CMOE.fullmatch(text):
            names = ("shared", "active", "parts", "overlapping", "dense")
            counts = {name: int(said) for name, said in zip(names, match.groups(), strict=True) if said}
            return Recipe.model_validate(counts)
        if match := _PAPER.fullmatch(text):
            routers, experts, top_k = map(int, match.groups())
            if routers != 1:
                raise FactorLLMError(f"recipe {text}: {routers} routers, but every host has one router a layer; use 1R")
            return Recipe(shared=0, active=top_k, parts=experts)
        if Path(text).suffix in {".yaml", ".yml"}:
            return _read_yaml(Path(text))
    except ValidationError as error:
        raise FactorLLMError(f"recipe {text}: {_first_problem(error)}") from None
    if parse_read_me(text):
        raise FactorLLMError(f"recipe {text} makes a model for each kind of text, which only `factorize` does")
    raise FactorLLMError(
        f"recipe {text!r} is not understood; write S2A2E8 (2 shared, 2 active, 8 parts), S0A4E8N3 (one of "
        f"3 overlapping experts of 4 of 8 parts), S2A2E8D1 (the first layer's FFN whole), 1R4E2K (1 router, 4 experts, "
        f"top-2), the path of a .yaml file, or {', '.join(LITERATURE)}"
    )


@dataclass(frozen=True)
class ReadMe:
    """Read-ME (arXiv 2410.19123): a static prune for each kind of text; which one answers is chosen once a request.

    Attributes:
        kinds: how many, K.
        prune: what each keeps of an FFN.
    """

    kinds: int
    prune: Recipe

    @property
    def name(self) -> str:
        return f"read-me:K{self.kinds}:{self.prune.name}"


def parse_read_me(text: str) -> ReadMe | None:
    """Read `read-me:K4`, which keeps half of each FFN, or with another share `read-me:K4:S6A0E8`; None for any other
    recipe.

    Raises:
        FactorLLMError: when what follows is no static prune, or there are not at least two kinds.

    Example:
        >>> parse_read_me("read-me:K4").name
        'read-me:K4:S4A0E8'
    """
    if not text.lower().startswith("read-me"):
        return None
    match = _READ_ME.fullmatch(text)
    if not match or not 2 <= int(match[1]) <= MOST_KINDS:
        raise FactorLLMError(
            f"recipe {text!r} is not understood; write read-me:K4 for 4 kinds of text (2 to {MOST_KINDS}), or "
            "read-me:K4:S6A0E8 to keep 6 of 8 parts of each FFN in the place of half of them"
        )
    prune = parse_recipe(match[2] or _HALF)
    if not prune.is_prune:
        raise FactorLLMError(
            f"recipe {text}: {prune.name} routes each token, and read-me chooses once a request; use a static prune "
            f"such as {prune.static_prune().name}"
        )
    return ReadMe(int(match[1]), prune)


def prune_recipe(keep: float, ffn_width: int) -> Recipe:
    """The static prune that keeps a share of the neurons, as nearly as widths that every file type takes allow.

    Raises:
        FactorLLMError: for a share that is not between 0 and 1.

    Example:
        >>> prune_recipe(0.6, 4864).name
        'S91A0E152'
    """
    if not 0 < keep < 1:
        raise FactorLLMError(f"--keep {keep} is no share of the neurons; give one between 0 and 1, such as 0.5")
    width = next((block for block in _BLOCKS if ffn_width % block == 0), 1)
    blocks = ffn_width // width
    kept = Fraction(min(max(round(keep * blocks), 1), blocks - 1), blocks)
    return Recipe(shared=kept.numerator, active=0, parts=kept.denominator)


def _read_yaml(path: Path) -> Recipe:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FactorLLMError(f"no recipe file {path}; check the path, or write the recipe as S2A2E8") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise FactorLLMError(f"recipe file {path} cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise FactorLLMError(f"recipe file {path} must hold keys such as `shared: 2`, `active: 2`, `parts: 8`")
    return Recipe.model_validate(content)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    where = ".".join(map(str, problem["loc"]))
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "extra_forbidden":
        return f"unknown key `{where}`; known keys: {', '.join(Recipe.model_fields)}"
    return f"`{where}`: {message}" if where else message
