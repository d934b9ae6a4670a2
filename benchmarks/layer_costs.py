"""What each layer is worth: KL(dense || dense without a part of one layer) in nats a token, nothing repaired.

    python benchmarks/layer_costs.py DENSE text.jsonl --shares 0.08 0.25

The parts are the layer's attention, and the shares of its FFN's neurons that contribute least to other documents. For
models whose layers are attention, then FFN, each added to the stream.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from common import document_starts, in_one_line, markdown_table
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from factorllm.convert.partition.energy import energy_shares
from factorllm.dense import open_model
from factorllm.dense.families import family_of
from factorllm.dense.ffn import FFN
from factorllm.dense.layer import ffn_of
from factorllm.dense.modules import decoder_layers

LENGTH = 256  # tokens of a document


@in_one_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("text")
    parser.add_argument("--documents", type=int, default=4, help="to choose neurons on, and as many to measure on")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.08, 0.25], help="of a layer's neurons left out")
    options = parser.parse_args()
    source = open_model(options.dense)
    rows = document_starts(source.tokenizer(), options.text, 2 * options.documents, LENGTH, LENGTH)
    if len(rows) < 2 * options.documents:
        raise SystemExit(
            f"{options.text} has {len(rows)} documents of {LENGTH} tokens; give more, or fewer --documents"
        )
    chosen_on, measured_on = torch.tensor(rows).split(options.documents)
    model = source.load_model(torch.float32, torch.device("cpu"))
    layers = decoder_layers(model)
    ffns = [ffn_of(layer, source.config) for layer in layers]
    modules = [layer.get_submodule(family_of(source.config).ffn.slot) for layer in layers]
    orders = [share.argsort() for share in shares(model, modules, ffns, chosen_on)]
    wanted = logs(model, measured_on)

    def cost(weight: Tensor, columns: Tensor) -> str:
        with without(weight, columns):
            lost = kl_div(logs(model, measured_on), wanted, log_target=True, reduction="sum")
        return f"{lost / measured_on.numel():.4f}"

    table = []
    for i, (layer, ffn, order) in enumerate(zip(layers, ffns, orders, strict=True)):
        given = layer.get_submodule("self_attn.o_proj").weight.detach()
        few = [order[: round(share * len(order))] for share in options.shares]
        table.append([str(i), cost(given, torch.arange(given.shape[1])), *(cost(ffn.down, off) for off in few)])
        print(table[-1], flush=True)
    print(markdown_table(["layer", "attention", *(f"{share:.0%} of the FFN" for share in options.shares)], table))


@torch.inference_mode()
def logs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities, (documents, tokens, vocabulary)."""
    return model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)


def shares(model: PreTrainedModel, modules: list[nn.Module], ffns: list[FFN], tokens: Tensor) -> list[Tensor]:
    """For each FFN, of each neuron the mean share of a token's contribution energy, (neurons,)."""
    found: list[Tensor] = []

    def note(ffn: FFN, given: tuple[Tensor]) -> None:
        found.append(energy_shares(ffn, ffn.hidden(given[0].flatten(0, 1))).mean(0))

    hooks = [
        module.register_forward_pre_hook(lambda _, given, ffn=ffn: note(ffn, given))
        for module, ffn in zip(modules, ffns, strict=True)
    ]
    logs(model, tokens)
    for hook in hooks:
        hook.remove()
    return found


@contextmanager
def without(weight: Tensor, columns: Tensor) -> Iterator[None]:
    """Without what some inputs of a matrix give."""
    kept = weight[:, columns]
    weight[:, columns] = 0
    yield
    weight[:, columns] = kept


if __name__ == "__main__":
    main()
