"""The keys of a GGUF file below its architecture: each must be applied, be known to change nothing, or be refused."""

from __future__ import annotations

import math

import gguf

from factorllm.errors import FactorLLMError, refusing

_UNAPPLIED = "changes what the model computes and is not applied"


class Keys:
    """Keys `<architecture>.*` of a file, by the part after the architecture. What is asked for counts as applied.

    Args:
        label: the file, for messages.
        fields: all of the file's.
    """

    instead = "use the model's safetensors checkpoint instead"

    def __init__(self, label: str, fields: dict[str, gguf.ReaderField], architecture: str):
        self.label, self._prefix = label, f"{architecture}."
        below = {key: field for key, field in fields.items() if key.startswith(self._prefix)}
        with refusing(label, "its header is damaged: fetch it again"):
            self._values = {key.removeprefix(self._prefix): field.contents() for key, field in below.items()}
        self._unread = set(self._values)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def integer(self, key: str, default: int | None = None) -> int:
        """A count of at least 1. An array, one entry a layer, is one when all its entries are the same.

        Raises:
            FactorLLMError: when it is missing without a default, or is none.
        """
        value = self._get(key, default)
        if isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.refusal(key, value, "is not one count for all layers")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number.

        Raises:
            FactorLLMError: when it is missing without a default, or is none.
        """
        value = self._get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise self.refusal(key, value, "is no number")
        return float(f"{value:.7g}")  # the fp32 of 9.99e-06 was 1e-05 where the model was made

    def text(self, key: str, default: str) -> str:
        """A string.

        Raises:
            FactorLLMError: when it is none.
        """
        value = self._get(key, default)
        if not isinstance(value, str):
            raise self.refusal(key, value, "is no text")
        return value

    def refuse_unless(self, key: str, *neutral: object) -> None:
        """Refuse a key that says anything else than what changes nothing.

        Raises:
            FactorLLMError: when it does.
        """
        if (value := self._get(key, neutral[0])) not in neutral:
            raise self.refusal(key, value)

    def refuse_unread(self) -> None:
        """Refuse what was not asked for.

        Raises:
            FactorLLMError: when there is such a key.
        """
        for key in sorted(self._unread):
            raise self.refusal(key, self._values[key])

    def refusal(self, key: str, value: object, why: str = _UNAPPLIED) -> FactorLLMError:
        """The refusal of what a key says."""
        return FactorLLMError(f"{self.label} says {self._prefix}{key} = {str(value)[:80]}, which {why}; {self.instead}")

    def _get(self, key: str, default: object) -> object:
        self._unread.discard(key)
        value = self._values.get(key, default)
        if value is None:
            raise FactorLLMError(f"{self.label} does not say {self._prefix}{key}; {self.instead}")
        return value
