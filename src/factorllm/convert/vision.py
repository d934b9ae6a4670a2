"""What a vision-language model makes of an image before the first layer of its text model: its own processor, vision
tower and projector run, and what they hand to the text model is kept for the layers that are streamed."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from factorllm.dense.ends import Ends
from factorllm.dense.families import keep_first_layers
from factorllm.dense.layer import Call, LayerLoader
from factorllm.dense.model import ModelSource
from factorllm.dense.modules import forwarding
from factorllm.dense.pretrained import load_processor, load_whole
from factorllm.dense.sequences import Sequences
from factorllm.dense.wrappers import WRAPPERS, Wrapper
from factorllm.errors import FactorLLMError, refusing
from factorllm.runs.digest import digest_of
from factorllm.runs.output import PROCESSOR_TEMPLATE
from factorllm.runs.workspace import write_shard
from factorllm.text.pictures import Picture, open_picture, words_of

SEEING = (
    "llava", "llava_next", "llava_onevision", "internvl", "mistral3", "idefics3", "smolvlm", "qwen3_5", "qwen3_vl",
)  # fmt: skip
"""Vision-language models whose images are looked at, by transformers' `model_type`."""

_PROCESSORS = ("processor_config.json", "preprocessor_config.json")
_TEMPLATES = ("chat_template.jinja", PROCESSOR_TEMPLATE)
_CLOSE = 1e-3  # relative: both compute the same


@dataclass(frozen=True)
class Document:
    """An image and its words, as the processor has them.

    Attributes:
        tokens: (n,), int64, the model's image token at each place of an image's.
        is_image: (n,), bool.
        inputs: what else the model reads: pixels, sizes.
    """

    picture: Picture
    tokens: Tensor
    is_image: Tensor
    inputs: dict[str, Tensor]


class Reader:
    """Makes documents of images with a model's own processor.

    Attributes:
        image_token: the number of the token that stands for a part of an image.

    Raises:
        FactorLLMError: when the model reads no images, or its images are not looked at yet, or it has no processor.
    """

    def __init__(self, source: ModelSource, tokenizer: PreTrainedTokenizerBase):
        self._label, self._end = source.label, tokenizer.eos_token_id
        config = seeing(source).config
        self.image_token = getattr(config, "image_token_id", None) or config.image_token_index
        folder = source.files[0].parent
        if not any((folder / name).is_file() for name in _PROCESSORS):
            raise FactorLLMError(
                f"{source.label} has no processor of images ({' or '.join(_PROCESSORS)}); copy it there from where the "
                "model comes from, or leave --images out"
            )
        self._processor = load_processor(folder, source.label)

    def document(self, picture: Picture) -> Document:
        """An image and its caption, or what a user asks of it, and the end token.

        Raises:
            FactorLLMError: when the image cannot be read, naming it.
        """
        image = open_picture(picture.path)
        with refusing(f"image {picture.path}", f"the processor of {self._label} cannot take it: leave it out"):
            words = words_of(picture, self._processor)
            first = self._processor.tokenizer.bos_token
            special = not (first and words.startswith(first))
            inputs = self._processor(text=[words], images=[image], add_special_tokens=special, return_tensors="pt")
            said = {name: torch.as_tensor(value) for name, value in inputs.items() if name not in _OF_TOKENS}
            tokens = inputs["input_ids"][0]
        if tokens[-1] != self._end:
            tokens = torch.cat([tokens, tokens.new_tensor([self._end])])
        is_image = tokens == self.image_token
        if not is_image.any():
            raise FactorLLMError(
                f"the processor of {self._label} puts no image token (number {self.image_token}) for {picture.path}, "
                "so the model would not see it; use the processor that belongs to the model"
            )
        return Document(picture, tokens, is_image, said)


_OF_TOKENS = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


def processor_digest(source: ModelSource) -> str:
    """xxh3-128 of what says how a model's processor makes its inputs, in hexadecimal."""
    folder = source.files[0].parent
    return digest_of(path for name in (*_PROCESSORS, *_TEMPLATES) if (path := folder / name).is_file())


def seeing(source: ModelSource) -> Wrapper:
    """The vision-language model that a text model is in.

    Raises:
        FactorLLMError: when it is in none, or in one whose images are not looked at yet.
    """
    if source.wrapper is None:
        raise FactorLLMError(
            f"{source.label} reads no images: it is a text model ({source.config.model_type}); leave --images out, or "
            "give the folder or hub id of a vision-language model"
        )
    kind = source.wrapper.config.model_type
    if kind not in SEEING:
        raise FactorLLMError(
            f"images of {kind} ({WRAPPERS[kind]}) are not looked at yet; leave --images out, or use one of "
            f"{', '.join(SEEING)}"
        )
    return source.wrapper


class Front:
    """A vision-language model up to the first layer of its text model, and the first of those layers to compare with.

    Args:
        length: tokens of a sequence.
    """

    def __init__(self, source: ModelSource, length: int, dtype: torch.dtype, device: torch.device):
        self._source, self._device, self._wrapper = source, device, seeing(source)
        self._model = load_whole(source.files[0].parent, shortened(self._wrapper), dtype).to(device).eval()
        self._layers = self._model.get_decoder().layers
        self._loader, self._ends = LayerLoader(source, length, dtype, device), Ends(source, device)

    @torch.no_grad()
    def write(self, document: Document, tokens: Tensor, path: Path) -> None:
        """Keep what the text model gets for a sequence that begins with an image.

        Args:
            tokens: (length,), the document's and those of the text after it.

        Raises:
            FactorLLMError: when the text model is called in a way that the layers that are streamed are not.
        """
        is_image = torch.zeros_like(tokens, dtype=torch.bool)
        is_image[: len(document.tokens)] = document.is_image
        inputs = self._inputs(document, tokens, is_image)
        with _positions(self._model) as positions:
            streams, calls = self._silenced(inputs, document)
        own = positions[0]
        kept = {"is_image": is_image, "stream": streams[0][0, is_image]}
        if own is not None and own.dim() == 3:
            kept["positions"] = own[-3:, 0]
        for layer, added in enumerate(streams[1:]):
            if added.any():
                self._refuse_unless(not added[0, ~is_image].any(), "text tokens are changed between layers")
                kept[f"added.{layer}"] = added[0, is_image]
        asked = kept.get("positions")
        ours = self._loader.calls(streams[0], None if asked is None else asked[:, None])
        for one, other in zip(calls, ours, strict=False):
            self._refuse_unless(_same(one, other), "its layers are called otherwise than for text")
        write_shard(path, {name: tensor.cpu().contiguous() for name, tensor in kept.items()})

    @torch.no_grad()
    def check(self, document: Document, sequences: Sequences, number: int) -> None:
        """Compare a sequence with an image as it is streamed with what the whole model computes, in its first layers.

        Raises:
            FactorLLMError: when they differ.
        """
        run = slice(number, number + 1)
        inputs = self._inputs(document, sequences.tokens[number], sequences.is_image(run)[0])
        wanted: list[Tensor] = []
        hooks = [layer.register_forward_pre_hook(lambda _, args: wanted.append(args[0])) for layer in self._layers]
        self._run(inputs, document)
        for hook in hooks:
            hook.remove()
        stream, beside = sequences.embed(run, self._ends.embed).to(wanted[0]), sequences.beside(run)
        for index, right in enumerate(wanted):
            error = (stream - right).double().norm() / right.double().norm()
            self._refuse_unless(error < _CLOSE, f"the stream before layer {index} differs by {error:.1e}")
            stream = self._loader.load(index).forward(stream, beside)

    def _inputs(self, document: Document, tokens: Tensor, is_image: Tensor) -> dict[str, Tensor]:
        inputs = document.inputs | {"input_ids": tokens[None]}
        if self._wrapper.config.model_type.startswith("qwen"):
            inputs["mm_token_type_ids"] = is_image[None].long()
        dtype = self._model.dtype
        return {
            name: value.to(self._device, dtype if value.is_floating_point() else None) for name, value in inputs.items()
        }

    def _silenced(self, inputs: dict[str, Tensor], document: Document) -> tuple[list[Tensor], list[Call]]:
        """The stream before the first layer, and what the model adds after each when layers give nothing; and what the
        layers are called with."""
        streams: list[Tensor] = []
        calls: list[Call] = []

        def record(stream: Tensor, *arguments, **keywords) -> Tensor:
            streams.append(stream)
            calls.append(Call(arguments, keywords))
            return torch.zeros_like(stream)

        with forwarding(self._layers, record):
            self._run(inputs, document)
        return streams, calls

    def _run(self, inputs: dict[str, Tensor], document: Document) -> None:
        with refusing(f"image {document.picture.path}", f"{self._source.label} cannot take it: leave it out"):
            self._model(**inputs, use_cache=False, logits_to_keep=1)

    def _refuse_unless(self, right: bool | Tensor, what: str) -> None:
        if not right:
            raise FactorLLMError(
                f"{self._source.label} with an image cannot be streamed exactly: {what}. Nothing is converted, for the "
                "student would be fitted to something else; leave --images out, and please report this"
            )


def shortened(wrapper: Wrapper) -> PreTrainedConfig:
    """The whole model's config with as few layers of the text model as show what it adds between them."""
    config = copy.deepcopy(wrapper.config)
    text = config.get_text_config()
    layers = 2 + len(getattr(config.vision_config, "deepstack_visual_indexes", ()))
    keep_first_layers(text, min(layers, text.num_hidden_layers))
    return config


@contextmanager
def _positions(model: nn.Module) -> Iterator[list[Tensor | None]]:
    """The positions that a model gives its text model while the block runs."""
    found: list[Tensor | None] = []
    hook = model.get_decoder().register_forward_pre_hook(
        lambda _, args, keywords: found.append(keywords.get("position_ids")), with_kwargs=True
    )
    try:
        yield found
    finally:
        hook.remove()


def _same(one: Call, other: Call) -> bool:
    names = one.keywords.keys() | other.keywords.keys()
    pairs = [(one.keywords.get(name), other.keywords.get(name)) for name in names - _UNUSED]
    return all(map(_equal, *zip(*pairs, strict=True))) and all(map(_equal, one.arguments, other.arguments))


_UNUSED = {"position_ids", "use_cache", "cache_position", "logits_to_keep"}
"""What layers are told and do not compute with: positions come as tables of rotations."""


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return bool(torch.equal(one, other))
    if isinstance(one, tuple | list) and isinstance(other, tuple | list):
        return len(one) == len(other) and all(map(_equal, one, other))
    return one is other or (not isinstance(one, Tensor) and not isinstance(other, Tensor) and one == other)
