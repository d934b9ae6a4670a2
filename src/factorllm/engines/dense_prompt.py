"""A prompt that the dense model reads and its student answers, in llama.cpp.

A student of an untouched attention has caches of keys and values of the dense model's shape, and what it was repaired
towards is the dense model's stream: on the dense model's cache it is nearer to it than on its own. So the dense model's
server reads each prompt, its cache is handed over by a file, and the student's server goes on from there. Prompts are
read at the dense model's speed, tokens are written at the student's, and both models are held in memory.
"""

from __future__ import annotations

from pathlib import Path

from factorllm.engines.llamacpp_client import Client, post
from factorllm.errors import FactorLLMError

_TRIED = 8  # tokens of the prompt that is tried before anything is served


class DensePrompt:
    """The dense model's server and its student's, both with `slot_save_path` in the same folder.

    Args:
        dense: http://HOST:PORT of the one that reads.
        student: of the one that answers.
        folder: where caches are handed over: of a request's, one file at a time for each slot.

    Raises:
        FactorLLMError: when llama.cpp cannot hand over what this dense model has read to this student.
    """

    def __init__(self, dense: str, student: str, folder: Path):
        self._dense, self._student, self._folder = dense, student, folder
        self._try_out()

    def read(self, tokens: list[int], slot: int) -> None:
        """Let the dense model read a prompt, so that the student's slot `slot` holds all of it but the last token.

        The student's request must name that slot under `id_slot` and leave `cache_prompt` on.

        Raises:
            RuntimeError: when llama.cpp refuses, as for a prompt that is longer than the context.
        """
        if len(tokens) < 2:
            return
        asked = {"prompt": tokens[:-1], "n_predict": 0, "id_slot": slot, "cache_prompt": True}
        post(self._dense, "/completion", asked)
        name = f"slot-{slot}"
        try:
            post(self._dense, f"/slots/{slot}?action=save", {"filename": name})
            post(self._student, f"/slots/{slot}?action=restore", {"filename": name})
        finally:
            (self._folder / name).unlink(missing_ok=True)

    def _try_out(self) -> None:
        """Whether the student goes on from what was handed over, instead of reading it again."""
        if Client(self._dense).words() != Client(self._student).words():
            raise FactorLLMError(f"{_CANNOT}: their vocabularies are not the same; {_INSTEAD}")
        tokens = list(range(_TRIED))
        asked = {"prompt": tokens, "n_predict": 1, "id_slot": 0, "cache_prompt": True}
        try:
            self.read(tokens, 0)
            read_again = post(self._student, "/completion", asked)["timings"]["prompt_n"]
        except RuntimeError as error:
            raise FactorLLMError(f"{_CANNOT} ({error}); {_INSTEAD}") from None
        if read_again != 1:
            raise FactorLLMError(f"{_CANNOT}: the student reads it again; {_INSTEAD}")


_CANNOT = "llama.cpp cannot hand over to the student what the dense model has read"
_INSTEAD = "give the model that it was made of, or leave out --dense-prompt"
