"""`heal --quantize`: a student that is healed as the file that it will be.

While it runs, its matrices are rounded as `export` will round them. The gradient with respect to the rounded weights
changes the exact ones (straight-through, Bengio et al., arXiv 1308.3432; for quantised weights Jacob et al., arXiv
1712.05877), which are what is written.
"""

from __future__ import annotations

from pathlib import Path

from accelerate.utils import parse_flag_from_env
from torch import Tensor
from transformers import PreTrainedModel

from factorllm.errors import FactorLLMError
from factorllm.exporting.checkpoints import open_checkpoint, refuse_unwritable
from factorllm.exporting.ggml import check_ggml
from factorllm.exporting.plan import check_file_type
from factorllm.exporting.rounded import InFile, as_in_file, types_in_file
from factorllm.healing.settings import HealSettings


def check_rounding(settings: HealSettings) -> None:
    """Refuse before the work what cannot be rounded while it learns, whatever the student.

    Raises:
        FactorLLMError: with the reason and what to do instead.
    """
    if settings.quantize is None:
        return
    check_file_type(settings.quantize)
    if settings.train == "lora":
        raise FactorLLMError(
            "--train lora adds what it learned to the weights at the end, and only then they are rounded, so nothing "
            "can be healed as the file that it will be; use --train all or ffn, or leave out --quantize"
        )
    if any(parse_flag_from_env(f"ACCELERATE_USE_{name}") for name in ("FSDP", "DEEPSPEED")):
        raise FactorLLMError(
            "--quantize rounds whole rows, of which FSDP and DeepSpeed give each process a part; heal in one process, "
            "or in several without them"
        )
    check_ggml()


def check_rounded(student: Path, settings: HealSettings) -> None:
    """As `check_rounding`, of a student that is there: one that is rounded must be one that can be exported."""
    check_rounding(settings)
    if settings.quantize:
        refuse_unwritable(open_checkpoint(str(student)), str(student))


class Rounding:
    """Matrices that are rounded while a model runs, and exact while they change.

    Args:
        matrices: as `types_in_file` gives them; none where nothing is rounded.
    """

    def __init__(self, matrices: list[InFile]):
        self._matrices = matrices
        self._exact: list[Tensor] = []
        self._frozen: dict[str, Tensor] = {}

    @classmethod
    def of(cls, model: PreTrainedModel, student: Path, file_type: str | None) -> Rounding:
        """Of a student in transformers, as `export` would write it in a type; None for nothing."""
        return cls([] if file_type is None else types_in_file(model, open_checkpoint(str(student)), file_type))

    def __bool__(self) -> bool:
        return bool(self._matrices)

    def begin(self) -> None:
        """Round; nothing is done where it is rounded already."""
        if self._exact:
            return
        for matrix in self._matrices:
            self._exact.append(matrix.parameter.data)
            matrix.parameter.data = self._rounded(matrix)

    def end(self) -> None:
        """Have the exact weights back."""
        if self._exact:
            for matrix, exact in zip(self._matrices, self._exact, strict=True):
                matrix.parameter.data = exact
            self._exact = []

    def _rounded(self, matrix: InFile) -> Tensor:
        known = self._frozen.get(matrix.name)
        if known is not None:
            return known
        rounded = as_in_file(matrix.name, matrix.parameter.data, matrix.kind, matrix.columns)
        if not matrix.parameter.requires_grad:
            self._frozen[matrix.name] = rounded
        return rounded
