"""Whether two models have the same tokens, so that what they say of the next one can be compared."""

from __future__ import annotations

import json
from collections.abc import Mapping
from operator import itemgetter
from typing import NamedTuple

import xxhash

from factorllm.errors import FactorLLMError


class Vocabulary(NamedTuple):
    """What a model's tokens are.

    Attributes:
        size: how many.
        digest: of all that have names, in their order.
    """

    size: int
    digest: str

    @classmethod
    def of(cls, size: int, names: Mapping[str, int]) -> Vocabulary:
        """That of a model with so many tokens, those that have names with their ids."""
        return cls(size, xxhash.xxh3_128(json.dumps(sorted(names.items(), key=itemgetter(1))).encode()).hexdigest())


def check_vocabularies(found: Mapping[str, Vocabulary]) -> None:
    """Refuse to compare next tokens of models that do not have the same.

    Args:
        found: that of the `student`, and of the `dense` model where one is given.
    """
    if len(set(found.values())) > 1:
        own, its = found["student"].size, found["dense"].size
        they = f"{own} tokens and the model of --against {its}" if own != its else "other tokens than --against"
        raise FactorLLMError(
            f"the student knows {they}, so they cannot be compared on --text; give the dense model that the student "
            "was made from"
        )
