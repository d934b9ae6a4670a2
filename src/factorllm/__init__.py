"""FactorLLM: turn a dense LLM into a faster sparse Mixture of Experts that every engine already loads."""

from factorllm.errors import FactorLLMError
from factorllm.recipe import Recipe, Shape, parse_recipe

__all__ = ["FactorLLMError", "Recipe", "Shape", "factorize", "parse_recipe"]


def __getattr__(name: str):
    # torch and transformers take seconds to import; `factorllm --help` needs neither.
    if name == "factorize":
        from factorllm.convert.factorize import factorize

        return factorize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
