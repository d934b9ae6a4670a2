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
from common import document_starts, markdown_table
from torch import Tensor, nn
from torch.nn.functional import kl_div
from transformers import PreTrainedModel

from factorllm.dense import open_model
from factorllm.dense.families import family_of
from factorllm.dense.names import layer_prefix

LENGTH = 256  # tokens of a document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense")
    parser.add_argument("text")
    parser.add_argument("--documents", type=int, default=4, help="to choose neurons on, and as many to measure on")
    parser.add_argument("--shares", type=float, nargs="+", default=[0.08, 0.25], help="of a layer's neurons left out")
    options = parser.parse_args()
    source = open_model(options.dense)
    rows = document_starts(source.tokenizer(), options.text, 2 * options.documents, LENGTH, LENGTH)
    chosen_on, measured_on = torch.tensor(rows).split(options.documents)
    model = source.load_model(torch.float32, torch.device("cpu"))
    layers = range(source.config.num_hidden_layers)
    downs = [model.get_submodule(layer_prefix(i) + _down(source.config)) for i in layers]
    orders = [use.argsort() for use in uses(model, downs, chosen_on)]
    wanted = logs(model, measured_on)

    def cost(weight: nn.Parameter, columns: Tensor) -> str:
        with without(weight, columns):
            lost = kl_div(logs(model, measured_on), wanted, log_target=True, reduction="sum")
        return f"{lost / measured_on.numel():.4f}"

    table = []
    for i in layers:
        given = model.get_submodule(f"{layer_prefix(i)}self_attn.o_proj").weight
        few = [orders[i][: round(share * len(orders[i]))] for share in options.shares]
        table.append([str(i), cost(given, torch.arange(given.shape[1])), *(cost(downs[i].weight, off) for off in few)])
        print(table[-1], flush=True)
    print(markdown_table(["layer", "attention", *(f"{share:.0%} of the FFN" for share in options.shares)], table))


def _down(config) -> str:
    layout = family_of(config).ffn
    return f"{layout.slot}.{layout.down}"


@torch.inference_mode()
def logs(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Log-probabilities, (documents, tokens, vocabulary)."""
    return model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)


def uses(model: PreTrainedModel, downs: list[nn.Linear], tokens: Tensor) -> list[Tensor]:
    """For each FFN, of each neuron the mean share of a token's contribution energy, (neurons,)."""
    found = {}

    def note(down: nn.Linear, given: tuple[Tensor]) -> None:
        energy = (given[0] * down.weight.norm(dim=0)) ** 2
        found[down] = (energy / energy.sum(-1, keepdim=True)).mean((0, 1))

    hooks = [down.register_forward_pre_hook(note) for down in downs]
    logs(model, tokens)
    for hook in hooks:
        hook.remove()
    return [found[down] for down in downs]


@contextmanager
def without(weight: nn.Parameter, columns: Tensor) -> Iterator[None]:
    """Without what some inputs of a matrix give."""
    kept = weight.data[:, columns]
    weight.data[:, columns] = 0
    yield
    weight.data[:, columns] = kept


if __name__ == "__main__":
    main()
