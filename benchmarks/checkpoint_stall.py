"""How long a checkpoint of a model of SmolLM2-135M's shape holds training up: written at once, and in the thread.

OMP_NUM_THREADS=1 python benchmarks/checkpoint_stall.py --tokens 512 --folder runs/stall
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from factorllm.healing.checkpoints import CheckpointWriter

SHAPE = LlamaConfig(
    vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
    num_key_value_heads=3, tie_word_embeddings=True,
)  # fmt: skip


def seconds(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    return time.monotonic() - start


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512, help="of a step")
    parser.add_argument("--folder", type=Path, required=True)
    options = parser.parse_args()
    model = LlamaForCausalLM(SHAPE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    tokens = torch.randint(0, SHAPE.vocab_size, (1, options.tokens))

    def passes() -> None:
        model(tokens, labels=tokens).loss.backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    def at_once() -> None:
        model.save_pretrained(folder)
        torch.save(optimizer.state_dict(), folder / "optimizer.pt")

    for _ in range(2):  # the first one also warms up
        alone = seconds(passes) + seconds(update)
    folder = options.folder
    folder.mkdir(parents=True)
    whole = seconds(at_once)
    size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
    print(f"{size:.2f} GB; a step {alone:.2f} s; written at once {whole:.2f} s", flush=True)
    for _ in range(3):
        shutil.rmtree(folder)
        folder.mkdir()
        writer = CheckpointWriter()
        begun = seconds(lambda: writer.begin(folder, model, optimizer.state_dict()))  # noqa: B023  called at once
        beside = seconds(passes)
        waited = seconds(writer.wait_for_copy)
        rest = seconds(update) + seconds(writer.finish)
        print(
            f"in the thread: begun in {begun:.3f} s, {waited:.3f} s for the copy after passes of {beside:.2f} s: "
            f"{(begun + waited) / whole:.1%} of at once; whole {rest:.2f} s later",
            flush=True,
        )
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
