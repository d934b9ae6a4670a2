"""Adapters of kinds of text against one of all text: quality on unseen documents of known kinds.

    factorllm heal STUDENT --teacher DENSE --text mixed.jsonl --tokens 250000 --train mor1e --kinds 5 -o runs/five
    factorllm heal STUDENT --teacher DENSE --text mixed.jsonl --tokens 250000 --train mor1e --kinds 1 -o runs/one
    python benchmarks/mor1e.py DENSE STUDENT runs/one runs/five --texts english.jsonl spanish.jsonl python.jsonl

KL(dense || model) in nats a token: of the student, of each folder's mixture, and, where it has more than one, of its
likeliest kind, its least likely one, and its best one (the oracle, which no user has) for each document.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import document_starts, in_one_line, markdown_table
from numpy.typing import NDArray
from peft import PeftModel
from torch import Tensor
from torch.nn.functional import kl_div
from transformers import PreTrainedTokenizerBase

from factorllm.dense import open_model
from factorllm.dense.safetensors import load_language_model
from factorllm.student.adapters import ADAPTERS, adapter_folders
from factorllm.student.read import load_student
from factorllm.text.intuition import Intuition

DOCUMENTS, LONGEST, SHORTEST = 8, 256, 64
"""Of a kind; tokens of each."""

Model = Callable[[Tensor], Tensor]
"""(1, tokens) to log-probabilities, (tokens, vocabulary)."""

Divergences = NDArray[np.float64]


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("student", type=Path)
    parser.add_argument("made", type=Path, nargs="+")
    parser.add_argument("--texts", nargs="+", required=True, help="documents of a kind each")
    options = parser.parse_args()
    source = open_model(options.dense)
    tokenizer = source.tokenizer()
    rows = [document_starts(tokenizer, text, DOCUMENTS, SHORTEST, LONGEST) for text in options.texts]
    tokens = [torch.tensor([row]) for row in itertools.chain(*rows)]
    owner = np.repeat(np.arange(len(rows)), [len(each) for each in rows])

    models = {"student": of(load_student(options.student))}
    for folder in options.made:
        models |= {str(folder): of(load_student(folder))} | dict(alone(folder))
    dense = of(source.load_model(torch.float32, torch.device("cpu")))
    found = np.array([list(divergences(dense, models, row)) for row in tokens])
    columns = dict(zip(models, found.T, strict=True))
    for folder in options.made:
        columns |= chosen(folder, columns, tokens, tokenizer)

    shown = [name for name in columns if f"/{ADAPTERS}/" not in name]
    means = np.array([[columns[name][owner == kind].mean() for name in shown] for kind in range(len(rows))])
    table = [[Path(text).stem, str(len(of_kind)), *map("{:.4f}".format, row)]
             for text, of_kind, row in zip(options.texts, rows, means, strict=True)]  # fmt: skip
    table.append(["mean", str(len(tokens)), *map("{:.4f}".format, means.mean(axis=0))])
    print(markdown_table(["text", "documents", *shown], table))


def of(model: torch.nn.Module) -> Model:
    return lambda tokens: model(input_ids=tokens, use_cache=False).logits[0].float().log_softmax(-1)


def alone(folder: Path) -> Iterator[tuple[str, Model]]:
    """Each adapter without the others, as peft runs it; of one, nothing."""
    found = adapter_folders(folder)
    if len(found) < 2:
        return
    model = load_language_model(folder, dtype=torch.float32).eval()
    adapted = PeftModel.from_pretrained(model, str(found[0]), adapter_name="0")
    for path in found[1:]:
        adapted.load_adapter(str(path), adapter_name=path.name)
    run = of(adapted)

    def by(name: str, tokens: Tensor) -> Tensor:
        adapted.set_adapter(name)
        return run(tokens)

    yield from ((str(path), partial(by, path.name)) for path in found)


@torch.inference_mode()
def divergences(dense: Model, models: dict[str, Model], tokens: Tensor) -> Iterator[float]:
    wanted = dense(tokens)
    for model in models.values():
        yield kl_div(model(tokens), wanted, log_target=True, reduction="sum").item() / tokens.numel()


def chosen(
    folder: Path, columns: dict[str, Divergences], tokens: list[Tensor], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Divergences]:
    """For each document the adapter of its likeliest kind, of its least likely one, and the best one."""
    names = [str(path) for path in adapter_folders(folder)]
    if len(names) < 2:
        return {}
    intuition, every = Intuition.load(folder), np.arange(len(tokens))
    likely = np.array([intuition.probabilities(tokenizer.decode(row[0])) for row in tokens])
    each = np.stack([columns[name] for name in names], axis=1)
    return {
        f"{folder}, likeliest": each[every, likely.argmax(axis=1)],
        f"{folder}, least likely": each[every, likely.argmin(axis=1)],
        f"{folder}, best": each.min(axis=1),
    }


if __name__ == "__main__":
    main()
