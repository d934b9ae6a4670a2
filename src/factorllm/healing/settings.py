"""How to heal. Unknown keys are refused."""

from __future__ import annotations

from typing import Literal

from pydantic import ConfigDict, Field

from factorllm.recipe import Shape
from factorllm.runs.settings import Chosen, Passes, Sequences, Tokens

Train = Literal["router", "experts", "ffn", "all", "lora", "mor1e"]

_RATE = 5e-4  # of the size of the student's weights
_LIGHT_RATE = 1.5e-4  # best at 25 % FFN sparsity of SmolLM2, where 5e-4 soon makes it worse (docs/experiments.md)
_LIGHT = 3 / 8  # FFN sparsity of a student with experts, in the middle of those that were measured
_LIGHT_PRUNE = 1 / 8  # of a prune: at 25 % it gains by 5e-4, at 5 % that makes it worse from the first step on


class HealSettings(Chosen):
    """How a student is healed. Length, seed and held-out part of the text are those that the student was made with.

    Example:
        >>> HealSettings(tokens=500_000, train="lora").lora_rank
        16
    """

    model_config = ConfigDict(allow_inf_nan=False)

    tokens: Tokens = 200_000
    """Tokens to train on."""
    epochs: Passes = 1
    """Times that each token is trained on."""
    train: Train = "all"
    """What learns: the routers; routers and routed experts (the paper); the whole FFNs; everything; low-rank
    adapters of attention and FFNs, merged before the checkpoint is written; or, as `mor1e`, an adapter for each kind of
    text, kept beside the student."""
    gates: Literal["straight-through", "all-experts", "soft"] = "straight-through"
    """Gate weights stay nearly binary and gradients pass to the router as if they were not; or so, but routers learn
    from what each expert would give, for which all are run; or they become the ordinary soft ones of the host."""
    learning_rate: float | None = Field(default=None, gt=0, le=1)
    """Peak of AdamW's, after a short warm-up; it falls to zero by a cosine. Default: found on the student itself before
    training; of few tokens, where that would take more than a tenth of the run, 5e-4 of the root mean square of its
    weights, or 1.5e-4 of it where less than 3/8 of the FFN is off, of a static prune less than 1/8."""
    router_rate: float = Field(default=1.0, ge=1e-3, le=1e3)
    """Learning rate of the routers, times that of all else."""
    coordinate: bool = False
    """Bring the routers' learning rate, while they train, to where their part of a step moves the student's predictions
    a fiftieth as far as the rest of it does."""
    temperature: float = Field(default=1.0, ge=0.01, le=100)
    """Of teacher and student in the KL divergence."""
    vocabulary: int = Field(default=64, ge=1, le=65_536)
    """Most likely tokens of the teacher that are compared one by one; the others are compared as one."""
    pa_weight: float = Field(default=0.1, ge=0, le=1e6)
    """Weight of the Prior-Approximate loss."""
    balance_weight: float = Field(default=0.001, ge=0, le=1e6)
    """Weight of the loss that evens the experts' load."""
    label_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the cross-entropy of the text itself, which also fits the student to that kind of text."""
    hidden_weight: float = Field(default=0.0, ge=0, le=1e6)
    """Weight of the distance to the teacher's residual stream; 0 keeps no streams on disk."""
    hidden_layers: int = Field(default=6, ge=1, le=65_536)
    """Layers after which the streams are compared, evenly spaced; each is 2 bytes a channel on disk for a token."""
    batch: Sequences = 2
    """Sequences in a step, over all processes."""
    micro_batch: Sequences = 2
    """Sequences that one process runs at once; the rest of the batch is accumulated."""
    validation_tokens: Tokens = 4096
    """Tokens kept from training, on which the learning rate and the best checkpoint are chosen. They are not the
    held-out ones."""
    evaluations: Passes = 8
    """Times that the validation loss is measured and a checkpoint for resuming is written."""
    patience: Passes = 3
    """Evaluations without a better validation loss, that of the start among them, after which training stops."""
    lora_rank: int = Field(default=16, ge=1, le=65_536)
    """Rank of the adapters of `train="lora"`."""
    kinds: int = Field(default=8, ge=1, le=1024)
    """Kinds of text that `train="mor1e"` finds in the text, each with an adapter; of one, it is a LoRA beside the
    student."""
    kind_rank: int = Field(default=8, ge=1, le=65_536)
    """Rank of the adapters of `train="mor1e"`."""
    quantize: str | None = None
    """Heal as the GGUF file that `export --type` of the same name writes, `q4_0` or `iq4_nl`: weights are rounded while
    the student runs, and exact while they change. Takes the weights' memory once more."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, for memory."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of matrix products; weights, losses and routing are fp32 always. `auto` takes bfloat16 where the hardware has
    it."""
    device: str = "auto"
    """`auto`, `cpu`, `cuda` ..."""

    @property
    def has_adapters(self) -> bool:
        """Whether adapters learn, and the student's own weights do not."""
        return self.train in ("lora", "mor1e")

    def measured(self, of: str = "") -> str:
        """What the validation loss is, in words.

        Args:
            of: what it is of, as in "of q4_0 weights ".
        """
        at = "" if self.temperature == 1 else f"at temperature {self.temperature:g} "
        return f"KL {of}{at}to the teacher on validation text"


def usual_rate(shape: Shape, weight: float) -> float:
    """The learning rate of a student on which none can be found: a smaller one where little of the FFN is off, and so
    little is to repair. A static prune bears the larger one always: all of it sees every token, so its gradients are
    less noisy.

    AdamW moves every weight by about the rate in each step, however small the weight; so the rate is a share of their
    size. SmolLM2-135M's weights are ten times as large as those of Qwen2.5-Coder-0.5B, which bears a tenth of the rate.

    Args:
        weight: root mean square of the student's matrices, of the median one.
    """
    light = shape.sparsity < (_LIGHT if shape.experts else _LIGHT_PRUNE)
    return (_LIGHT_RATE if light else _RATE) * weight
