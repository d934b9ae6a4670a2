"""What `factorllm.json` must say, so that what reads it can rely on it."""

from __future__ import annotations

from typing import Annotated, Literal, NotRequired

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from typing_extensions import TypedDict

from factorllm.recipe import Recipe
from factorllm.runs.settings import Settings

FORMAT = 1
"""Version of `factorllm.json`."""

_Share = Annotated[float, Field(ge=-1e-9, le=1 + 1e-9)]
_Finite = Annotated[float, Field(allow_inf_nan=False)]


class _BaseModel(TypedDict):
    name: str
    fingerprint: str


class _Images(TypedDict):
    origin: str
    calibration_images: NonNegativeInt
    calibration_image_tokens: NonNegativeInt
    calibration_text_tokens: NonNegativeInt
    held_out_images: NonNegativeInt
    held_out_image_tokens: NonNegativeInt
    held_out_text_tokens: NonNegativeInt


class _Data(TypedDict):
    origin: str
    fingerprint: str
    calibration_tokens: NonNegativeInt
    held_out_tokens: NonNegativeInt
    images: NotRequired[_Images]
    kinds_of: NotRequired[str]


_NO_MORE = ConfigDict(extra="forbid")
"""Of what is taken whole: tables have a line for each model, and its numbers make a `Cost`."""


class _Row(TypedDict):
    __pydantic_config__ = _NO_MORE
    perplexity: Annotated[float, Field(gt=0, allow_inf_nan=False)]
    ffn_sparsity: _Finite
    active_parameters: NonNegativeInt
    total_parameters: NonNegativeInt
    flops_per_token: NonNegativeInt


class _Results(TypedDict):
    __pydantic_config__ = _NO_MORE
    dense: _Row
    student: _Row
    healed: NotRequired[_Row]
    pruned: NotRequired[_Row]


class _FFNError(TypedDict):
    text: _Finite
    image: _Finite


class _Layer(TypedDict):
    layer: NotRequired[NonNegativeInt]
    router_agreement: _Share | None
    energy_kept: _Finite
    expert_load: list[_Share]
    ridge_strength: _Finite | None
    stream_error: _Finite
    ffn_error: NotRequired[_FFNError]


class _HealedBefore(TypedDict):
    tokens: NonNegativeInt
    text: str


class _Healing(TypedDict):
    tokens: NonNegativeInt
    text: str
    held_out_tokens: NotRequired[NonNegativeInt]
    before: NotRequired[list[_HealedBefore]]
    settings: dict
    curve: list[dict[str, _Finite]]


class _Provenance(BaseModel):
    """Keys that are not named here may be there, but among the results; later versions and other tools add some."""

    model_config = ConfigDict(extra="allow")

    format: Literal[1]
    base_model: _BaseModel
    recipe: Recipe
    host: str
    engines: list[str]
    data: _Data
    settings: Settings
    versions: dict[str, str]
    results: _Results
    logit_scale: _Finite
    layers: Annotated[list[_Layer], Field(min_length=1)]
    healing: _Healing | None = None


def check_provenance(content: object) -> None:
    """Check the content of a `factorllm.json`.

    Raises:
        ValueError: when something is missing or of another kind; says what.
    """
    _Provenance.model_validate(content)
