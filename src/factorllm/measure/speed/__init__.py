"""Speed of models in one engine: measured in turns in one run, as medians and ratios."""

from factorllm.measure.speed.run import run_bench
from factorllm.measure.speed.timing import Plan

__all__ = ["Plan", "run_bench"]
