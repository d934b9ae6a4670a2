"""The `Modelfile` by which Ollama takes a GGUF file: its template in Ollama's language, and where an answer ends."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from factorllm.dense.safetensors import read_tokenizer
from factorllm.runs.output import MADE
from factorllm.runs.workspace import write_text
from factorllm.text.conversations import as_text

_SYSTEM, _USER, _ANSWER = "\ue000system\ue000", "\ue000user\ue000", "\ue000answer\ue000"


@dataclass(frozen=True)
class _Turns:
    """What a chat template puts round each part of a conversation."""

    system: tuple[str, str]
    user: tuple[str, str]
    answer: tuple[str, str]

    def render(self, system: str, turns: list[tuple[str, str]]) -> str:
        text = system.join(self.system)
        for question, answer in turns:
            text += question.join(self.user) + answer.join(self.answer)
        return text

    def as_go(self) -> str:
        """In Go's template language, as Ollama fills it in for each turn."""
        parts = [("System", self.system), ("Prompt", self.user)]
        before = "".join(f"{{{{ if .{name} }}}}{a}{{{{ .{name} }}}}{b}{{{{ end }}}}" for name, (a, b) in parts)
        return f"{before}{self.answer[0]}{{{{ .Response }}}}{self.answer[1]}"


def write_modelfile(gguf_file: Path, out: Path) -> None:
    """Write `Modelfile` into `out`, for a GGUF file in it and the checkpoint beside that."""
    write_text(out / "Modelfile", modelfile(gguf_file.name, read_tokenizer(out / MADE, str(out))))


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The content: file, template and stops. A template that is no simple sequence of turns is left to Ollama, which
    reads the one in the file."""
    lines = [f"FROM ./{gguf_name}"]
    turns = _turns(tokenizer)
    if turns:
        lines.append(f'TEMPLATE """{turns.as_go()}"""')
    else:
        lines.append("# no TEMPLATE: the model's own one, which is in the file, cannot be said in Ollama's language")
    for stop in _stops(tokenizer, turns):
        lines.append(f'PARAMETER stop "{stop}"')
    return "\n".join(lines) + "\n"


def _turns(tokenizer: PreTrainedTokenizerBase) -> _Turns | None:
    """The parts of a chat template, found by filling it in; None where it is not made of such parts alone."""
    if not isinstance(tokenizer.chat_template, str):
        return None
    asked = [("system", _SYSTEM), ("user", _USER)]
    answered = [*asked, ("assistant", _ANSWER)]
    try:
        opened, whole = _filled(tokenizer, asked, opens=True), _filled(tokenizer, answered)
        twice = _filled(tokenizer, [*answered, ("user", _USER)], opens=True)
        before, rest = opened.split(_SYSTEM)
        between, after = rest.split(_USER)
        opening, closing = _opening(tokenizer), whole.split(_ANSWER)[1]
        # What stands between system and user is the end of one and the start of the other: the second question says.
        start = twice.split(_ANSWER)[1].split(_USER)[0].removeprefix(closing)
        user = (start, after.removesuffix(opening))
        found = _Turns((before, between.removesuffix(start)), user, (opening, closing))
        same = found.render(_SYSTEM, [(_USER, _ANSWER)]) == whole and between.endswith(start)
    except (ValueError, IndexError):
        return None
    return found if same and '"""' not in found.as_go() else None


def _opening(tokenizer: PreTrainedTokenizerBase) -> str:
    """What begins an answer."""
    asked = [("user", _USER)]
    return _filled(tokenizer, asked, opens=True).removeprefix(_filled(tokenizer, asked))


def _filled(tokenizer: PreTrainedTokenizerBase, messages: list[tuple[str, str]], opens: bool = False) -> str:
    conversation = [{"role": role, "content": content} for role, content in messages]
    try:
        return as_text(tokenizer, conversation, opens)
    except Exception as error:  # the template is the model's own, and may raise anything
        raise ValueError(str(error)) from None


def _stops(tokenizer: PreTrainedTokenizerBase, turns: _Turns | None) -> list[str]:
    """Where an answer ends: the model's end token, and what the template puts after an answer."""
    after = turns.answer[1].strip() if turns else ""
    found = [tokenizer.eos_token, after if after in tokenizer.get_vocab() else None]
    return list(dict.fromkeys(stop for stop in found if stop))
