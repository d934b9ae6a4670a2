"""Speed of models in one engine: measured in turns in one run, as medians and ratios."""

from factorllm.bench.measure import Plan
from factorllm.bench.run import run_bench

__all__ = ["Plan", "run_bench"]
