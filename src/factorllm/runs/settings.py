"""How to build: everything about a run that is not the recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from factorllm.errors import FactorLLMError

if TYPE_CHECKING:  # the command line makes its options from these models, and must not wait for torch
    import torch
    from transformers import PreTrainedConfig

MOST_TOKENS = 10**12
LARGEST_SEED = 2**32 - 1
"""What numpy takes; torch takes more."""

Seed = Annotated[int, Field(ge=0, le=LARGEST_SEED)]
Threads = Annotated[int, Field(ge=1, le=4096)]
Sequences = Annotated[int, Field(ge=1, le=65_536)]
Passes = Annotated[int, Field(ge=1, le=10_000)]
Tokens = Annotated[int, Field(ge=1, le=MOST_TOKENS)]

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


class Chosen(BaseModel):
    """What a user chooses, in Python or YAML. Pydantic takes True for 1, and text for the number in it: True is refused
    where a number is wanted, and text where a count is. A rate may be text, for YAML takes 1e-4 for one. Unknown keys
    are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _is_of_its_kind(cls, value: Any, info: ValidationInfo) -> Any:
        kinds = _kinds(cls.model_fields[str(info.field_name)].annotation)
        for each in value if isinstance(value, list | tuple) else (value,):
            if isinstance(each, bool) and bool not in kinds and kinds & {int, float}:
                raise ValueError(f"{str(each).lower()} is no number; give one")
            if isinstance(each, str) and int in kinds:
                raise ValueError(f"{each!r} is text; write a count as 100000, without quotes")
        return value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types in a field's annotation."""
    inner = get_args(annotation)[:1] if get_origin(annotation) is Annotated else get_args(annotation)
    return set().union(*map(_kinds, inner)) if inner else {annotation}


class Settings(Chosen):
    """How a run is done. Unknown keys are refused.

    Example:
        >>> Settings(tokens=50_000, tune=2).dtype
        'auto'
    """

    tokens: Tokens = 100_000
    """Tokens to calibrate on; of `trim` and `sample`, to count and to write."""
    held_out_tokens: Tokens = 16_384
    """Tokens kept apart to measure on: perplexity before and after; of `trim`, how much more finely text is cut."""
    length: int = Field(default=512, ge=8, le=2**24)
    """Tokens in a packed sequence."""
    seed: Seed = 0
    """Seed of everything random."""
    host: str = "auto"
    """Architecture of the student; `auto` takes the first that holds it exactly."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda`, `cuda:1` ..."""
    dtype: Dtype = "auto"
    """Dtype of the written weights; `auto` keeps the dense model's, or takes float32 where the host needs it."""
    baseline: bool = True
    """Also make the static prune with the same active parameters, to be compared with; it is measured, not kept."""
    tune: int = Field(default=0, ge=0, le=10_000)
    """Passes over the calibration tokens that fit each layer's kept neurons by gradient, before the restore."""
    memory_limit: int = Field(default=1 << 29, ge=0, le=1 << 60)
    """Bytes that one kind of a layer's activations may take in memory before it spills to disk."""

    def resolve(self, config: PreTrainedConfig) -> Settings:
        """The same settings with every `auto` decided for a model.

        Raises:
            FactorLLMError: when the device is not there, or the model's sequences or dtype are none to work with.
        """
        from factorllm.runs.device import usable_device

        dtype: str = self.dtype
        if dtype == "auto":
            dtype = str(config.dtype or "float32").removeprefix("torch.")
        if dtype not in get_args(Dtype):
            raise FactorLLMError(
                f"the model is stored in {dtype}, which students are not; use --dtype float32, or save it so first"
            )
        device = usable_device(self.device)
        limits = [self.length, config.max_position_embeddings, getattr(config, "sliding_window", None)]
        length = min(limit for limit in limits if limit)
        if length < 2:
            raise FactorLLMError("the model reads sequences of one token, in which there is no next one to learn from")
        return self.model_copy(update={"dtype": dtype, "device": device, "length": length})

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device(self.device)

    @property
    def stored_dtype(self) -> torch.dtype:
        import torch

        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def compute_dtype(self) -> torch.dtype:
        """bf16 checkpoints are computed in bf16 on a GPU; all else in fp32. Statistics are fp32 always."""
        import torch

        on_gpu = self.torch_device.type == "cuda"
        return torch.bfloat16 if on_gpu and self.stored_dtype == torch.bfloat16 else torch.float32
