"""GGUF files: what llama.cpp computes from them is what transformers computes from the checkpoint."""

from pathlib import Path
from statistics import median

import pytest
import sentencepiece
import torch
from conftest import ATTENTION_BIAS, CONFIGS, WIDE_HEADS, save_dense, some_tokens, words
from tokenizers import Tokenizer, decoders, models, trainers
from transformers import AutoModelForCausalLM, LlamaTokenizerFast, PreTrainedTokenizerFast

from factorllm import factorize
from factorllm.engines import EngineProcess, Options
from factorllm.export import export_gguf
from factorllm.sources.pretokenizers import PRE_TOKENIZERS

VOCABULARY = 300
PROMPTS = 12
TEXT = [words(30, seed) + f" {seed * 137} it's  fine,\n\nÜber naïve 中文!" for seed in range(60)]


def byte_level_tokenizer(pre: str = "smollm") -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = PRE_TOKENIZERS[pre]
    tokenizer.decoder = decoders.ByteLevel()
    from tokenizers.pre_tokenizers import ByteLevel

    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<s>", "</s>"], initial_alphabet=sorted(ByteLevel.alphabet())
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=VOCABULARY + 60,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
    )
    return LlamaTokenizerFast(vocab_file=str(folder / "tokenizer.model"), legacy=False)


def save_model(config, folder: Path, tokenizer=None) -> None:
    tokenizer = tokenizer or byte_level_tokenizer()
    sized = type(config).from_dict(config.to_dict() | {"vocab_size": len(tokenizer) + 4})  # embeddings are often padded
    save_dense(sized, folder)
    tokenizer.save_pretrained(folder)


def differences(folder: Path, gguf_file: Path) -> list[float]:
    """For each prompt, the largest difference of a log-probability of the next token among the ten likeliest."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with EngineProcess("llamacpp", gguf_file, Options(context=128, decode_threads=1)) as engine, torch.no_grad():
        for seed in range(PROMPTS):
            prompt = some_tokens(model.config, rows=1, length=20 + seed, seed=seed)
            wanted = model(prompt).logits[0, -1].log_softmax(-1)
            top = engine.next_tokens(prompt[0].tolist(), 10)
            found.append(max(abs(wanted[token].item() - value) for token, value in top))
    return found


HOSTED = [
    *((name, "mixtral", "S0A2E4") for name in ("gqa-tied", "mha", "llama3-rope", "mistral")),
    *((name, "granitemoeshared", "S2A2E8") for name in ("gqa-tied", "gqa-untied", "llama3-rope")),
    *((name, "qwen2_moe", recipe) for name in ("gqa-tied", "qwen2") for recipe in ("S0A2E4", "S2A2E8")),
    ("qwen3", "qwen3_moe", "S0A2E4"),
    *((name, "glm4_moe", "S2A2E8") for name in ("gqa-tied", "qwen2", "qwen3")),
    ("gqa-tied", "auto", "S4A0E8"),
    ("attention-bias", "granitemoeshared", "S2A2E8"),
    ("wide-heads", "mixtral", "S0A2E4"),
    ("wide-heads", "glm4_moe", "S2A2E8"),
]


@pytest.mark.engine
@pytest.mark.parametrize(("name", "host", "recipe"), HOSTED)
def test_llamacpp_agrees_with_transformers(name, host, recipe, tmp_path, text_file, small):
    config = {"attention-bias": ATTENTION_BIAS, "wide-heads": WIDE_HEADS, **CONFIGS}[name]
    save_model(config, tmp_path / "dense")
    settings = small.model_copy(update={"host": host, "baseline": False})
    factorize(str(tmp_path / "dense"), tmp_path / "out", recipe, text=str(text_file), settings=settings)
    medians = {}
    for model in ("dense", "out"):
        export_gguf(str(tmp_path / model), tmp_path / f"{model}.gguf", "f32")
        medians[model] = median(differences(tmp_path / model, tmp_path / f"{model}.gguf"))
    assert medians["out"] <= 1.5 * medians["dense"]
    assert medians["dense"] < 0.02
