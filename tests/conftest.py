"""Tiny random dense models of each family, a byte-level tokenizer, and a text to calibrate on."""

from __future__ import annotations

import copy
import functools
import gc
import json
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import gguf
import openai
import pytest
import torch
import typer.main
from forked import Forked, command, free_port
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from factorllm.runs.settings import Settings

# A shell without a terminal starts what runs in the background with Ctrl-C ignored, and so would be what tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file goes first: at the end one worker would be left alone with it."""
    items.sort(key=lambda item: item.path.name != "test_real_model.py")


@pytest.hookimpl(wrapper=True)
def pytest_report_to_serializable() -> Iterator[None]:
    """Half a character, which damaged inputs have and logs repeat, would end the worker that reports it."""
    found = yield
    return _whole(found)


def _whole(said: Any) -> Any:
    match said:
        case str():
            return said.encode(errors="replace").decode()
        case dict():
            return {name: _whole(value) for name, value in said.items()}
        case list() | tuple():
            return type(said)(map(_whole, said))
        case _:
            return said


@pytest.fixture(scope="module", autouse=True)
def what_is_there_is_left_out_of_collections() -> None:
    """Of garbage, of which a healing asks for five: half of their time went over what tests before had imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def nothing_is_waited_for_a_thousand_times() -> Iterator[None]:
    """Files are there for whoever reads them before the disk has them; commands are always the same; transformers
    asks for a file's names with each of its modules, and lm-eval pip for the environment with each task."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda file: None)
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "")
        yield


CHAT_TEMPLATE = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"

BASE = {
    "vocab_size": 258,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "initializer_range": 0.2,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    "gqa-tied": LlamaConfig(**BASE | {"tie_word_embeddings": True}),
    "gqa-untied": LlamaConfig(**BASE),
    "mha": LlamaConfig(**BASE | {"num_key_value_heads": 4}),
    "odd-sizes": LlamaConfig(
        **BASE | {"hidden_size": 40, "num_attention_heads": 5, "num_key_value_heads": 1, "intermediate_size": 192}
    ),
    "llama3-rope": LlamaConfig(
        **BASE,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "mistral": MistralConfig(**BASE | {"sliding_window": None}),
    "qwen2": Qwen2Config(**BASE),
    "qwen3": Qwen3Config(**BASE | {"head_dim": 16}),
}
"""Dense configs, each of which some host can hold without and with a shared expert."""

ATTENTION_BIAS = LlamaConfig(**BASE | {"attention_bias": True})
WIDE_HEADS = LlamaConfig(**BASE | {"head_dim": 16})
SLIDING_WINDOW = MistralConfig(**BASE | {"sliding_window": 16})


def save_dense(config: PreTrainedConfig, folder: Path, seed: int = 0, **save_options) -> PreTrainedModel:
    """Save a random dense model with norms and biases that are not all alike, and its tokenizer."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", ".bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder, **save_options)
    byte_tokenizer().save_pretrained(folder)
    return model


def edit_json(path: Path, **changes) -> None:
    """Change some keys of a JSON file."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, `<s>` and `</s>`."""
    vocabulary = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": 256, "</s>": 257}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=CHAT_TEMPLATE
    )


def around_texts(tokenizer: PreTrainedTokenizerFast, template: str) -> PreTrainedTokenizerFast:
    """The same tokenizer, which puts around each text what a template such as `<s> $A </s>` says."""
    ids = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(template, special_tokens=ids)
    return tokenizer


def words(count: int, seed: int = 0) -> str:
    chooser = random.Random(seed)
    vocabulary = ["expert", "router", "layer", "token", "sparse", "dense", "neuron", "model", "stream", "the", "of"]
    return " ".join(chooser.choice(vocabulary) for _ in range(count))


@pytest.fixture(scope="session")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 60,000 bytes, which are as many tokens, in documents of 40 words."""
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text("\n\n".join(words(40, seed) for seed in range(240)))
    return path


@pytest.fixture(scope="session")
def dense_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny dense model `gqa-tied`."""
    folder = tmp_path_factory.mktemp("dense") / "tiny-llama"
    save_dense(CONFIGS["gqa-tied"], folder)
    return folder


SMALL = Settings(tokens=2048, held_out_tokens=256, length=64, baseline=False)
"""For tiny models."""


@pytest.fixture
def small() -> Settings:
    return SMALL


def tasks_of_lm_eval(*folders: str):
    """lm-eval's own tasks in some of its folders: of all of them it reads 8,800 files."""
    import lm_eval.tasks

    own = Path(lm_eval.tasks.__file__).parent
    return lm_eval.tasks.TaskManager(include_path=[own / folder for folder in folders], include_defaults=False)


def some_tokens(config: PreTrainedConfig, rows: int = 2, length: int = 48, seed: int = 7) -> torch.Tensor:
    return torch.randint(0, config.vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed))


def relative_error(got: torch.Tensor, wanted: torch.Tensor) -> float:
    return ((got - wanted).norm() / wanted.norm()).item()


@contextmanager
def served(model: str, *options: str) -> Iterator[tuple[openai.OpenAI, Callable[[], str]]]:
    """A model behind `factorllm serve`: a client that can reach it, and what the server has printed so far."""
    port = free_port()
    server = command("serve", model, "--port", port, *options, own_session=True)

    def printed() -> str:
        return "".join(server.said())

    try:
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        _wait_until_ready(client, server, printed)
        yield client, printed
    finally:
        with suppress(ProcessLookupError):  # it may have ended by itself
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def comes_true(condition: Callable[[], bool], seconds: float = 30) -> bool:
    """For what a server does just after the client has its answer, such as to count it out."""
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def _wait_until_ready(client: openai.OpenAI, server: Forked, printed: Callable[[], str]) -> None:
    for _ in range(3000):
        if server.poll() is not None:
            pytest.fail(printed())
        try:
            client.models.list()
            return
        except openai.APIError:
            time.sleep(0.1)
    pytest.fail(f"the server did not start: {printed()}")
