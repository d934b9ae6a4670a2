"""What the fuzz tests stand on: valid tiny inputs, commands run in this process, and what must be true of their end."""

from __future__ import annotations

import hashlib
import io
import json
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from conftest import BASE, byte_tokenizer, save_dense, some_tokens, words
from rich.console import Console
from tokenizers import Tokenizer, decoders, models
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

from factorllm import cli, factorize
from factorllm.cli import terminal
from factorllm.dense.gguf.pretokenizers import PRE_TOKENIZERS
from factorllm.errors import FactorLLMError
from factorllm.exporting import export_gguf
from factorllm.runs.settings import Settings

ALL_RUN = "S2A6E8"
"""A recipe whose students are the dense model itself."""

PATIENCE = 20
"""Seconds of processor time after which an input is said to hang a command."""

ROOM = 4 << 30
"""Bytes that a command may take beside what the process has: an absurd size must not fill the machine's memory."""

_TINY = BASE | {"vocab_size": 264, "num_hidden_layers": 2, "max_position_embeddings": 32}
DENSE = {
    "llama": LlamaConfig(**_TINY),
    "llama-tied": LlamaConfig(**_TINY | {"tie_word_embeddings": True}),
    "mistral": MistralConfig(**_TINY | {"sliding_window": 16}),
    "qwen2": Qwen2Config(**_TINY),
    "qwen3": Qwen3Config(**_TINY | {"head_dim": 16}),
}
GGUFS = ("llama", "llama-tied", "qwen2", "qwen3")
SHARDED = "llama-sharded"


class Hang(BaseException):
    """A command took more than its time. No Exception, so that nobody takes it for a damaged input."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Bases:
    """Folders of valid inputs: dense models by name, `students/...`, `gguf/...`, and texts."""

    root: Path

    def folder(self, name: str) -> Path:
        return self.root / name

    def json(self, name: str) -> dict:
        return json.loads((self.root / name).read_text())


def tokenizer_with_merges() -> PreTrainedTokenizerFast:
    """About one token a byte; a GGUF file's tokenizer needs merges, so there are some."""
    vocabulary = {token: index for token, index in byte_tokenizer().get_vocab().items() if index < 256}
    merges = [("e", "r"), ("t", "h"), ("th", "e")]
    added = {"".join(merge): 258 + index for index, merge in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary | {"<s>": 256, "</s>": 257} | added, merges=merges))
    tokenizer.pre_tokenizer = PRE_TOKENIZERS["gpt-2"]
    tokenizer.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", chat_template=template
    )


def make_bases(root: Path) -> Bases:
    tokenizer = tokenizer_with_merges()
    for name, config in DENSE.items():
        save_dense(config, root / name)
        tokenizer.save_pretrained(root / name)
    save_dense(DENSE["llama"], root / SHARDED, max_shard_size="40KB")
    tokenizer.save_pretrained(root / SHARDED)
    text = root / "text.txt"
    text.write_text("\n\n".join(words(40, seed) for seed in range(110)))
    for name in GGUFS:
        (root / "gguf" / name).mkdir(parents=True)
        export_gguf(str(root / name), root / "gguf" / name / "model.gguf", "f32")
    settings = Settings(tokens=64, held_out_tokens=64, length=32, baseline=False)
    for name, recipe in (("sparse", "S2A2E8"), ("prune", "S4A0E8")):
        factorize(str(root / "llama"), root / "students" / name, recipe, text=str(text), settings=settings)
    for name, content in (("scores.json", SCORES), ("speed.json", SPEED)):
        (root / name).write_text(json.dumps(content))
    return Bases(root)


_SCORE = {"value": 0.5, "error": 0.1, "questions": 10}
SCORES = {
    "scores": {"student": {"copa": _SCORE}, "dense": {"copa": _SCORE}},
    "perplexity": {"student": 3.0, "dense": 2.0},
    "agreement": {"kl": 0.1, "top_1": 0.5},
    "chain": {
        "chain": "a",
        "documents": 2,
        "f1": {"student": 0.5},
        "steps": [{"name": "b", "asked": 2, "given": 1.0, "own": 0.5}],
    },
}
SPEED = {
    "engine": "llamacpp",
    "models": [{"name": name, "ratio_to_dense": {"decode x1": [1.0, 0.9, 1.1]}} for name in ("student", "dense")],
}


@contextmanager
def bounded_memory() -> Iterator[None]:
    """At most `ROOM` bytes more than now; not on a machine with a GPU, whose driver reserves more at once."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    if not torch.cuda.is_available():
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def patience() -> Iterator[None]:
    """Stop what takes more than `PATIENCE` seconds of processor time; pytest's own limit is of wall time."""

    def stop(*_) -> None:
        raise Hang

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, PATIENCE)
    try:
        yield
    except Hang:
        raise AssertionError(f"no end after {PATIENCE} s") from None
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def run(*arguments: object) -> Ended:
    """A command in this process, with streams that refuse what those of a terminal do, and "y" to any question."""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8", errors="backslashreplace")
    before = sys.argv, sys.stdin
    sys.argv, sys.stdin = ["factorllm", *map(str, arguments)], io.StringIO("y\n" * 9)
    # One that could not say something keeps it, and tries again.
    terminal.console = Console(markup=False, emoji=False)
    code = 0
    try:
        with redirect_stdout(out), redirect_stderr(err), patience():
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv, sys.stdin = before
    return Ended(code, *(_content(stream) for stream in (out, err)))


def _content(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8", "replace")


def check_end(ended: Ended) -> None:
    """Done or refused: exit code 0, or 2 and one line that says why; never a traceback."""
    assert ended.code in (0, 2), ended.err[-500:]
    assert "Traceback" not in ended.out + ended.err
    lines = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == (1 if ended.code else 0), ended.err[-500:]


def refused(action: Callable[[], object]) -> bool:
    """Whether an action is refused; whatever else it raises is a fault."""
    try:
        with patience():
            action()
    except FactorLLMError:
        return True
    return False


def digest(*paths: Path) -> str:
    """Of the names, links and contents of everything in folders, or of files."""
    found = hashlib.blake2b()
    for path in paths:
        for entry in sorted(path.rglob("*")) if path.is_dir() else [path]:
            found.update(str(entry).encode("utf-8", "surrogateescape"))
            if entry.is_symlink():
                found.update(str(entry.readlink()).encode())
            elif entry.is_file():
                found.update(entry.read_bytes())
    return found.hexdigest()


def check_no_output(out: Path) -> None:
    """Nothing that looks whole, and nothing that would be in the way of the same command with a better input."""
    assert not out.exists(), f"{out.name} is there after a refusal"
    partial = out.with_name(out.name + ".partial")
    left = {path.name for path in partial.iterdir()} if partial.is_dir() else set()
    assert "journal.jsonl" in left or not left - {"lock"}, f"a refusal left {sorted(left)}"


def fresh_copy(base: Path, work: Path) -> Path:
    """A copy of a base, in an empty folder for one example."""
    shutil.rmtree(work, ignore_errors=True)
    return Path(shutil.copytree(base, work / base.name, symlinks=True))


@torch.no_grad()
def logits_of(model: PreTrainedModel) -> torch.Tensor:
    """More tokens than the context holds, or a sliding window."""
    tokens = some_tokens(DENSE["llama"], rows=2, length=40) % 256
    return model.eval()(tokens.clamp_max(model.config.vocab_size - 1)).logits.float()


def check_same(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-4) -> None:
    assert torch.isfinite(found).all(), "the logits of what was made are not finite"
    assert found.shape == wanted.shape
    found, wanted = found.double(), wanted.double()  # a bit may make a logit of which fp32 has no square
    error = ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
    assert error <= tolerance, f"silently another model: relative error {error:.3g}"


def as_transformers_reads(folder: Path, **options) -> PreTrainedModel:
    """The truth of a folder. What plain transformers cannot load should have been refused: its error is a failure."""
    # How attention is computed is not what it computes, and a config may name what this machine has not.
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    config._attn_implementation = "eager"
    return AutoModelForCausalLM.from_pretrained(folder, config=config, trust_remote_code=False, **options)


def check_student(out: Path, dense: Path, tolerance: float = 1e-4) -> None:
    """A student of `ALL_RUN` computes what transformers computes from the dense folder, but for its fitted scale."""
    scale = json.loads((out / "factorllm.json").read_text())["logit_scale"]
    assert abs(scale - 1) < 0.02
    student, teacher = as_transformers_reads(out), as_transformers_reads(dense)
    AutoTokenizer.from_pretrained(out)
    rounding = {torch.float16: 5e-3, torch.bfloat16: 4e-2}.get(student.dtype, tolerance)
    check_same(logits_of(student.float()) / scale, logits_of(teacher.float()), rounding)


@torch.no_grad()
def check_trimmed(out: Path, dense: Path) -> None:
    """A trimmed model computes what transformers computes from the dense folder, and says texts with tokens of it."""
    kept = torch.tensor(json.loads((out / "factorllm.vocabulary.json").read_text())["kept"])
    small, large = (as_transformers_reads(folder, dtype=torch.float32).eval() for folder in (out, dense))
    tokens = torch.arange(len(kept))[None, :40]
    check_same(small(tokens).logits, large(kept[tokens]).logits[..., kept])
    few, all_ = (AutoTokenizer.from_pretrained(folder, trust_remote_code=False) for folder in (out, dense))
    said = "the weather, there: ünï 7"
    assert all_.decode(kept[few(said).input_ids].tolist()) == all_.decode(all_(said).input_ids)


_GGUF_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    **{f"attn_{short}": f"self_attn.{short}_proj" for short in "qkv"},
    "attn_output": "self_attn.o_proj",
    **{f"attn_{short}_norm": f"self_attn.{short}_norm" for short in "qk"},
    **{f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")},
}


def model_of_gguf(path: Path) -> PreTrainedModel:
    """The truth of a GGUF file, made anew from its keys and tensors as llama.cpp takes them."""
    reader = gguf.GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    below = {key.removeprefix(f"{architecture}."): field for key, field in reader.fields.items()}
    keys = {key: _of_all_layers(field.contents()) for key, field in below.items() if key not in reader.fields}
    config = _gguf_config(architecture, keys, reader.tensors)
    weights = {}
    for tensor in reader.tensors:
        if tensor.name == "rope_freqs.weight":
            assert (tensor.data == 1).all()
            continue
        values = torch.from_numpy(np.array(gguf.quants.dequantize(tensor.data, tensor.tensor_type)))
        name = _transformers_name(tensor.name)
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        for projection, count in heads.items():
            if architecture == "llama" and projection in name:
                values = values.unflatten(0, (count, -1, 2)).transpose(1, 2).flatten(0, 2)
        weights[name] = values
    model = AutoModelForCausalLM.from_config(config)
    weights.setdefault("lm_head.weight", weights["model.embed_tokens.weight"])
    for name, parameter in model.named_parameters():  # biases that a file lacks are zero in llama.cpp
        if name.endswith(".bias"):
            weights.setdefault(name, torch.zeros_like(parameter))
    model.load_state_dict(weights)
    return model


def _of_all_layers(value: object) -> object:
    """A number that is said for each layer, and is the same for all."""
    alike = isinstance(value, list) and value and value.count(value[0]) == len(value)
    return value[0] if alike and isinstance(value[0], int) else value


def check_student_of_gguf(out: Path, path: Path) -> None:
    """The same for a student of a GGUF file."""
    scale = json.loads((out / "factorllm.json").read_text())["logit_scale"]
    # A flipped bit can make a weight so large that the closed-form repair rounds; another model is off by far more.
    check_same(logits_of(as_transformers_reads(out).float()) / scale, logits_of(model_of_gguf(path)), 1e-2)


def _transformers_name(name: str) -> str:
    *block, short, kind = name.split(".")
    prefix = f"model.layers.{block[1]}." if block else ""
    return f"{prefix}{_GGUF_NAMES[short]}.{kind}"


def _gguf_config(architecture: str, keys: dict, tensors: list) -> LlamaConfig:
    kind = {"llama": LlamaConfig, "qwen2": Qwen2Config, "qwen3": Qwen3Config}[architecture]
    heads, hidden = keys["attention.head_count"], keys["embedding_length"]
    rope = {"rope_theta": keys.get("rope.freq_base", 10000.0), "rope_type": "default"}
    factor = keys.get("rope.scaling.factor") or keys.get("rope.scale_linear") or 0
    scaling = keys.get("rope.scaling.type", "linear")
    if factor and scaling != "none":
        rope |= {"rope_type": scaling, "factor": factor}
    if rope["rope_type"] == "yarn":
        rope["original_max_position_embeddings"] = keys.get("rope.scaling.original_context_length")
    return kind(
        vocab_size=next(int(t.shape[-1]) for t in tensors if t.name == "token_embd.weight"),
        hidden_size=hidden,
        intermediate_size=keys["feed_forward_length"],
        num_hidden_layers=keys["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=keys.get("attention.head_count_kv", heads),
        head_dim=keys.get("attention.key_length", hidden // heads),
        rms_norm_eps=keys["attention.layer_norm_rms_epsilon"],
        max_position_embeddings=keys["context_length"],
        rope_parameters=rope,
        tie_word_embeddings=False,
    )
