"""A smaller vocabulary: what stays computes what it did, text is still text, and ids are right wherever they stand."""

import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import CONFIGS, SMALL, byte_tokenizer, edit_json
from families import TINY
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from test_export import TEXT, byte_level_tokenizer, save_model, sentencepiece_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from factorllm import FactorLLMError, export, factorize, heal
from factorllm.engines import EngineProcess, Options
from factorllm.measure.front.plan import FrontPlan
from factorllm.measure.front.run import run_front
from factorllm.measure.perplexity import perplexity
from factorllm.measure.scores import evaluate
from factorllm.measure.settings import EvalSettings
from factorllm.report.findings import gather
from factorllm.report.measured import Measured
from factorllm.runs.settings import Settings
from factorllm.text.calibration import hold_out
from factorllm.text.parts import open_text
from factorllm.trimming import trim as module
from factorllm.trimming.byte_pairs import BytePairs
from factorllm.trimming.choose import choose_tokens
from factorllm.trimming.trim import trim

COUNTED = Settings(tokens=2048, held_out_tokens=256, length=64)
STAY = 280  # of 300
OTHER = "Żółw Ω≈ç√ 東京\t\r\n  def f(x): return {x: [y]}"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"{number} {each}"}) + "\n" for number, each in enumerate(TEXT * 6)))
    return path


@pytest.fixture(scope="module")
def trimmed(tmp_path_factory, text):
    """A model, and it with fewer tokens."""
    root = tmp_path_factory.mktemp("trim")
    save_model(CONFIGS["mha"], root / "dense")
    trim(str(root / "dense"), root / "small", STAY, str(text), settings=COUNTED)
    return root


def kept_in(folder):
    return json.loads((folder / "factorllm.vocabulary.json").read_text())["kept"]


ODD = ("llama", "qwen2", "phi3", "lfm2", "gemma4_text", "cohere", "granite", "nemotron_h")
"""With all that is odd about the ends of a model: tied, scaled, capped, by other names."""


@pytest.mark.parametrize("family", ODD)
def test_logits_of_the_tokens_that_stay_are_the_dense_models(family, text, tmp_path):
    save_model(TINY[family], tmp_path / "dense")
    trim(str(tmp_path / "dense"), tmp_path / "small", STAY, str(text), settings=COUNTED)
    kept, new = torch.tensor(kept_in(tmp_path / "small")), torch.arange(STAY).view(4, -1)[:, :32]
    dense, small = (AutoModelForCausalLM.from_pretrained(tmp_path / name).eval() for name in ("dense", "small"))
    assert small.config.vocab_size == STAY
    assert small.config.architectures == dense.config.architectures
    with torch.no_grad():
        torch.testing.assert_close(small(new).logits, dense(kept[new]).logits[..., kept], rtol=1e-4, atol=1e-5)


def test_ids_are_right_wherever_they_stand(trimmed, text, tmp_path):
    shutil.copytree(trimmed / "dense", tmp_path / "dense")
    tokenizer = byte_level_tokenizer()
    begin, end = (tokenizer.convert_tokens_to_ids(token) for token in ("<s>", "</s>"))
    edit_json(tmp_path / "dense/config.json", bos_token_id=begin, eos_token_id=[end, 299], pad_token_id=299)
    edit_json(tmp_path / "dense/generation_config.json", eos_token_id=[299, end], decoder_start_token_id=298)
    around = [("<s>", begin), ("</s>", end)]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=around)
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])
    tokenizer.save_pretrained(tmp_path / "dense")
    trim(str(tmp_path / "dense"), tmp_path / "small", STAY, str(text), settings=COUNTED)
    kept = kept_in(tmp_path / "small")
    assert kept == sorted(kept)
    assert {298, 299} <= set(kept)
    config, generation = (
        json.loads((tmp_path / f"small/{name}.json").read_text()) for name in ("config", "generation_config")
    )
    assert [kept[index] for index in config["eos_token_id"]] == [end, 299]
    assert kept[config["pad_token_id"]] == 299
    assert [kept[index] for index in generation["eos_token_id"]] == [299, end]
    assert kept[generation["decoder_start_token_id"]] == 298
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert (
        [kept[index] for index in small("~").input_ids]
        == tokenizer("~").input_ids
        == [begin, tokenizer.vocab["~"], end]
    )
    assert (kept[small.bos_token_id], kept[small.eos_token_id]) == (begin, end)


def test_a_trimmed_model_is_no_student(trimmed, text, tmp_path):
    with pytest.raises(FactorLLMError, match="is a dense model, trimmed from dense by factorllm"):
        heal(trimmed / "small", str(trimmed / "dense"), tmp_path / "healed", text=str(text))


def test_tokens_that_are_no_special_ones_but_put_around_a_text_stay(trimmed, text, tmp_path):
    shutil.copytree(trimmed / "dense", tmp_path / "dense")
    gone = next(index for index in reversed(range(300)) if index not in kept_in(trimmed / "small"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "dense")
    word = tokenizer.convert_ids_to_tokens(gone)
    around = processors.TemplateProcessing(single=f"{word} $A", special_tokens=[(word, gone)])
    tokenizer.backend_tokenizer.post_processor = around
    tokenizer.save_pretrained(tmp_path / "dense")
    trim(str(tmp_path / "dense"), tmp_path / "small", STAY, str(text), settings=COUNTED)
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert kept_in(tmp_path / "small")[small("~").input_ids[0]] == gone


def test_special_tokens_without_a_row_are_left_out(trimmed, text, tmp_path):
    """As of Phi-3 with tools: the model could not read them."""
    shutil.copytree(trimmed / "dense", tmp_path / "dense")
    tokenizer = byte_level_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<|{number}|>" for number in range(6)]})
    assert len(tokenizer) == 306  # of 304 rows
    tokenizer.save_pretrained(tmp_path / "dense")
    trim(str(tmp_path / "dense"), tmp_path / "small", STAY, str(text), settings=COUNTED)
    small = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert len(small) == STAY
    assert [small.convert_tokens_to_ids(f"<|{number}|>") for number in range(4)] == [*range(STAY - 4, STAY)]
    assert "<|4|>" not in small.get_vocab()


def with_decoder():
    tokenizer, bare = sentencepiece_tokenizer(), [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.backend_tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *bare])
    return tokenizer


KINDS = {
    "byte level": byte_level_tokenizer,
    "whole words": lambda: byte_level_tokenizer("llama-bpe"),
    "sentencepiece": with_decoder,
}


@pytest.mark.parametrize("kind", KINDS)
def test_text_stays_what_it_is_and_is_cut_as_before_where_its_tokens_stay(kind, text, tmp_path):
    before = KINDS[kind]()
    size = len(before) - 20
    save_model(CONFIGS["mha"], tmp_path / "dense", before)
    made = trim(str(tmp_path / "dense"), tmp_path / "small", size, str(text), settings=COUNTED)
    kept, after = kept_in(tmp_path / "small"), AutoTokenizer.from_pretrained(tmp_path / "small")
    assert made.vocabulary == (len(before) + 4, size)
    assert len(after) == len(kept) == size
    cut = []

    @settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.one_of(st.sampled_from([*TEXT, OTHER]), st.text(st.sampled_from("".join(TEXT[:3]))), st.text()))
    def look(said):
        old, new = (tokenizer(said, add_special_tokens=False).input_ids for tokenizer in (before, after))
        assert after.decode(new) == before.decode(old)
        if set(old) <= set(kept):
            assert [kept[index] for index in new] == old
        cut.append(set(old) <= set(kept))

    look()
    assert {True, False} == set(cut)


def test_the_smallest_vocabulary_writes_spaces(text, tmp_path):
    """The bytes of SentencePiece's mark would be read as the mark itself."""
    before = with_decoder()
    save_model(CONFIGS["mha"], tmp_path / "dense", before)
    with pytest.raises(FactorLLMError, match="single bytes and special tokens alone are 260"):
        trim(str(tmp_path / "dense"), tmp_path / "small", 259, str(text), settings=COUNTED)
    trim(str(tmp_path / "dense"), tmp_path / "small", 260, str(text), settings=COUNTED)
    after = AutoTokenizer.from_pretrained(tmp_path / "small")
    assert after.decode(after("the  router\n", add_special_tokens=False).input_ids) == "the  router\n"


@pytest.mark.parametrize(
    ("more", "stay"),
    [
        (1, ["de"]),  # nothing but it has room: the others are made of another first
        (2, ["abc", "ab"]),  # the most frequent, and what it is made of
        (3, ["abc", "ab", "de"]),
        (4, ["abc", "ab", "de", "def"]),
        (5, ["abc", "ab", "de", "def", "gh"]),  # of what is not in the text the lowest id
    ],
)
def test_the_most_frequent_tokens_stay_with_what_they_are_made_of(more, stay):
    tokenizer = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    learned = {"gh": 258, "ab": 259, "abc": 260, "de": 261, "def": 262, "ghi": 263}
    pairs = [["g", "h"], ["a", "b"], ["ab", "c"], ["d", "e"], ["de", "f"], ["gh", "i"]]
    tokenizer["model"] |= {"vocab": tokenizer["model"]["vocab"] | learned, "merges": pairs}
    counts = torch.zeros(264, dtype=torch.int64)
    counts[[260, 262, 261]] = torch.tensor([9, 1, 5])
    kept = choose_tokens(BytePairs(tokenizer, "it"), counts, {256, 257}, 258 + more)
    assert kept == [*range(258), *sorted(learned[token] for token in stay)]


@pytest.fixture(scope="module")
def student(trimmed, text):
    """Of the model with fewer tokens, with all experts on."""
    factorize(str(trimmed / "small"), trimmed / "student", "S4A4E8", text=str(text), settings=SMALL)
    return trimmed / "student"


@pytest.mark.engine
def test_a_trimmed_model_is_converted_exported_and_computed_by_llamacpp(student, tmp_path):
    export(str(student), tmp_path / "student.gguf", "f32")
    model, tokenizer = (kind.from_pretrained(student) for kind in (AutoModelForCausalLM, AutoTokenizer))
    ids = tokenizer(TEXT[0], add_special_tokens=False).input_ids[:40]
    with EngineProcess("llamacpp", tmp_path / "student.gguf", Options(context=64)) as process, torch.no_grad():
        assert process.tokenize(TEXT[0])[:40] == ids
        likely = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        for token, value in process.next_tokens(ids, 10):
            assert likely[token].item() == pytest.approx(value, abs=0.02)


def test_what_is_made_of_a_gguf_file_says_its_architecture(trimmed, text, tmp_path):
    """By which vLLM knows it; the file does not say it."""
    export(str(trimmed / "dense"), tmp_path / "dense.gguf", "f32")
    factorize(str(tmp_path / "dense.gguf"), tmp_path / "pruned", "S4A0E8", text=str(text), settings=SMALL)
    assert json.loads((tmp_path / "pruned/config.json").read_text())["architectures"] == ["LlamaForCausalLM"]


@pytest.mark.engine
def test_a_gguf_file_is_trimmed_as_its_folder_is(trimmed, text, tmp_path):
    export(str(trimmed / "dense"), tmp_path / "dense.gguf", "f32")
    trim(str(tmp_path / "dense.gguf"), tmp_path / "small", STAY, str(text), settings=COUNTED)
    own, wanted = (AutoModelForCausalLM.from_pretrained(root / "small") for root in (tmp_path, trimmed))
    assert kept_in(tmp_path / "small") == kept_in(trimmed / "small")
    assert own.config.architectures == wanted.config.architectures == ["LlamaForCausalLM"]
    for name, tensor in wanted.state_dict().items():
        assert torch.equal(own.state_dict()[name], tensor)


@pytest.mark.engine
def test_on_a_front_perplexity_is_for_a_token_of_the_dense_models(trimmed, text, tmp_path):
    plan = FrontPlan(types=("f32",), perplexity_tokens=256, rounds=2, prompt=8, context=8, steps=2, threads=1)
    small, dense = ([str(trimmed / name)] for name in ("small", "dense"))
    front = run_front(small, dense, str(text), tmp_path / "out", plan, cache=tmp_path / "cache")
    found = {point.model: point for point in front.points}
    assert [point.kind for point in front.points] == ["dense", "trimmed"]

    made = Settings(length=64)  # all that the models take; neither was fitted to the text
    nats, sizes = {}, {}
    for name in ("dense", "small"):
        model, tokenizer = (kind.from_pretrained(trimmed / name) for kind in (AutoModelForCausalLM, AutoTokenizer))
        tokens = hold_out(open_text(str(text), tokenizer, made), made)[:4]
        predicted = tokens[:, 1:]
        nats[name] = math.log(perplexity(model, tokens)) * predicted.numel()
        sizes[name] = sum(len(tokenizer.decode(row).encode()) for row in predicted), predicted.numel()
    (of_dense, dense_tokens), (of_small, _) = sizes["dense"], sizes["small"]
    assert of_small < of_dense  # it takes more tokens for the same text, and as many are measured
    assert found["dense"].perplexity == pytest.approx(math.exp(nats["dense"] / dense_tokens), rel=2e-3)
    wanted = math.exp(nats["small"] / of_small * of_dense / dense_tokens)
    assert found["small"].perplexity == pytest.approx(wanted, rel=2e-3)


@pytest.mark.engine
def test_models_of_as_many_but_other_tokens_are_not_compared(trimmed, student, text, tmp_path):
    """Ids of one would be read as those of the other."""
    (tmp_path / "other.jsonl").write_text("".join(json.dumps({"text": f"{OTHER} {n}"}) + "\n" for n in range(80)))
    trim(str(trimmed / "dense"), tmp_path / "other", STAY, str(tmp_path / "other.jsonl"), settings=COUNTED)
    asked = {"text": str(text), "settings": EvalSettings(tasks=()), "cache": tmp_path / "cache"}
    with pytest.raises(FactorLLMError, match="the student knows other tokens than --against"):
        evaluate(student, against=str(tmp_path / "other"), **asked)
    assert evaluate(student, against=str(trimmed / "small"), **asked).agreement.kl < 0.1
    with pytest.raises(FactorLLMError, match="knows 280 tokens and the student others"):
        gather(student, str(tmp_path / "other"), Measured(), "cpu", Console(quiet=True))
    for name, path in {"student": student, "small": trimmed / "small", "other": tmp_path / "other"}.items():
        export(str(path), tmp_path / f"{name}.gguf", "f32")
    read_by = {name: Options(context=64, reader=str(tmp_path / f"{name}.gguf")) for name in ("small", "other")}
    with pytest.raises(FactorLLMError, match="their vocabularies are not the same"):
        EngineProcess("llamacpp", tmp_path / "student.gguf", read_by["other"])
    EngineProcess("llamacpp", tmp_path / "student.gguf", read_by["small"]).close()


def test_what_is_done_is_not_done_again_and_what_is_the_users_stays(trimmed, text, tmp_path):
    given = str(trimmed / "dense"), tmp_path / "small", STAY
    trim(*given, str(text), settings=COUNTED)
    before = {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()}
    assert trim(*given, str(text), settings=COUNTED) is None
    assert trim(*given[:2], np.int64(STAY), str(text), settings=COUNTED) is None
    with pytest.raises(FactorLLMError, match="made with other vocabulary"):
        trim(str(trimmed / "dense"), tmp_path / "small", STAY + 1, str(text), settings=COUNTED)
    dense = shutil.copytree(trimmed / "dense", tmp_path / "dense")
    (dense / "generation_config.json").write_text((dense / "generation_config.json").read_text() + " ")
    with pytest.raises(FactorLLMError, match="made with other files beside the weights"):
        trim(str(dense), tmp_path / "small", STAY, str(text), settings=COUNTED)
    assert trim(*given, str(text), settings=COUNTED, overwrite=True).vocabulary[1] == STAY
    assert {path.name: path.read_bytes() for path in (tmp_path / "small").iterdir()} == before
    (tmp_path / "small/notes.txt").write_text("mine")
    with pytest.raises(FactorLLMError, match=r"notes\.txt, which factorllm did not put there"):
        trim(*given, str(text), settings=COUNTED, overwrite=True)
    with pytest.raises(FactorLLMError, match="which this command reads"):
        trim(str(trimmed / "dense"), trimmed / "dense", STAY, str(text), settings=COUNTED)


def test_a_killed_run_goes_on_and_ends_with_the_same_bytes(trimmed, text, tmp_path, monkeypatch):
    given, asked = (str(trimmed / "dense"), tmp_path / "small", STAY), {"text": str(text), "settings": COUNTED}
    written, write = [], module.write_shard

    def killed_at_the_third(path, tensors):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, tensors)

    monkeypatch.setattr(module, "write_shard", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        trim(*given, **asked)
    assert not (tmp_path / "small").exists()
    monkeypatch.setattr(module, "write_shard", lambda path, tensors: written.append(path.name) or write(path, tensors))
    trim(*given, **asked)
    assert len(written) == len(set(written)) == 4
    names = [path.name for path in (trimmed / "small").iterdir() if path.name != "README.md"]  # which has its own name
    assert [
        name for name in names if (trimmed / "small" / name).read_bytes() != (tmp_path / "small" / name).read_bytes()
    ] == []


@pytest.mark.parametrize("check", ["check_tokenizer", "open_model"])
def test_what_is_refused_at_the_end_leaves_nothing(trimmed, text, tmp_path, monkeypatch, check):
    before = getattr(module, check)

    def refuses_what_is_trimmed(*given):
        if check == "open_model" and given[0] == str(trimmed / "dense"):
            return before(*given)
        assert (tmp_path / "small.partial/trimmed/tokenizer.json").exists()
        raise FactorLLMError("it is not what it was")

    monkeypatch.setattr(module, check, refuses_what_is_trimmed)
    with pytest.raises(FactorLLMError, match="it is not what it was"):
        trim(str(trimmed / "dense"), tmp_path / "small", STAY, str(text), settings=COUNTED)
    assert list(tmp_path.iterdir()) == []


def words_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "<unk>": 2, "the": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


def as_roberta():
    tokenizer = byte_level_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.RobertaProcessing(("</s>", 1), ("<s>", 0))
    return tokenizer


def with_vocabulary(change):
    """A byte level tokenizer of another vocabulary."""
    said = json.loads(byte_level_tokenizer().backend_tokenizer.to_str())
    said["model"]["vocab"] = change(said["model"]["vocab"])
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(said)), bos_token="<s>", eos_token="</s>"
    )


def test_bytes_that_the_tokenizer_never_met_are_no_reason_to_refuse(text, tmp_path):
    """SmolLM2 has no tokens for 21 of them; with all of its tokens they are lost too."""
    before = with_vocabulary(lambda words: {word: i for i, word in enumerate(w for w in words if w not in ("ÿ", "ī"))})
    assert len(before) == 298
    save_model(CONFIGS["mha"], tmp_path / "dense", before)
    assert trim(str(tmp_path / "dense"), tmp_path / "small", STAY, str(text), settings=COUNTED).vocabulary == (
        302,
        STAY,
    )
    after = AutoTokenizer.from_pretrained(tmp_path / "small")
    for said in (OTHER, *TEXT[:5]):
        old, new = (tokenizer.decode(tokenizer(said).input_ids) for tokenizer in (before, after))
        assert new == old


def without_a_byte():
    return with_vocabulary(lambda words: {word if word != "ÿ" else "ÿÿ": index for word, index in words.items()})


def without_bytes():
    tokenizer = Tokenizer(models.BPE({"<s>": 0, "</s>": 1, "a": 2, "b": 3, "ab": 4}, [("a", "b")]))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize(
    ("vocabulary", "change", "said"),
    [
        (str(STAY), {}, f"--vocabulary '{STAY}' is no whole number"),
        (True, {}, "--vocabulary True is no whole number"),
        (304, {}, "the model has 304 tokens, so none is left out"),
        (257, {}, "single bytes and special tokens alone are 258; choose a larger --vocabulary than 257"),
        (3, {"tokenizer": words_tokenizer}, r"is no byte pair encoding of bytes \(it is WordLevel\)"),
        (STAY, {"tokenizer": without_a_byte}, "has no tokens for single bytes"),
        (3, {"tokenizer": without_bytes}, "has no tokens for single bytes, so text .* would be lost"),
        (STAY, {"tokenizer": as_roberta}, "puts tokens around text by RobertaProcessing"),
        (STAY, {"generation": {"pad_token_id": 304}}, "says token 304, but it has 304; mend it first"),
        (STAY, {"settings": Settings(held_out_tokens=2**17, length=64)}, "the text is too short"),
        (STAY, {"generation": {"suppress_tokens": [5]}}, r"lists tokens by their ids \(suppress_tokens\)"),
    ],
)
def test_what_cannot_be_trimmed_is_refused_and_nothing_is_left(vocabulary, change, said, text, tmp_path):
    save_model(CONFIGS["mha"], tmp_path / "dense", change.get("tokenizer", byte_level_tokenizer)())
    edit_json(tmp_path / "dense/generation_config.json", **change.get("generation", {}))
    with pytest.raises(FactorLLMError, match=said):
        trim(
            str(tmp_path / "dense"), tmp_path / "small", vocabulary, str(text), settings=change.get("settings", COUNTED)
        )
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
