"""How to evaluate. Unknown keys are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from factorllm.runs.given import given
from factorllm.runs.settings import Chosen


class EvalSettings(Chosen):
    """What models are asked, and how they compute.

    Example:
        >>> EvalSettings(tasks=("arc_easy",), limit=100).dtype
        'float32'
    """

    tasks: tuple[str, ...] = ("arc_easy", "piqa", "boolq", "copa", "lambada_openai")
    """Names of `tasks.TASKS`."""
    data: Annotated[Path, AfterValidator(lambda path: Path(given(path)))] | None = None
    """Folder of local `<task>.jsonl`. Default: lm-eval's data from the hub."""
    limit: int | None = Field(default=None, ge=1, le=1_000_000)
    """Questions of each task. Default: all."""
    run_generated_code: bool = False
    """Run programs that the models write, which humaneval asks for."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` ..."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype that the models compute in."""
