"""Vision-language models: the text model becomes sparse, what is round it stays, and stock transformers loads both."""

import copy
import json

import gguf
import pytest
import torch
import transformers
from conftest import byte_tokenizer, edit_json, relative_error, some_tokens
from families import TINY
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from factorllm import FactorLLMError, HealSettings, Recipe, factorize, heal
from factorllm.dense import open_model
from factorllm.exporting import export_gguf
from factorllm.student.read import read_provenance

CLIP = {
    "model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
    "num_attention_heads": 2, "image_size": 16, "patch_size": 8, "projection_dim": 32,
}  # fmt: skip
SIGLIP = {key: value for key, value in CLIP.items() if key not in ("model_type", "projection_dim")}
PIXTRAL = SIGLIP | {"model_type": "pixtral", "head_dim": 16}
QWEN = {
    "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32,
    "num_position_embeddings": 16, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
IMAGE = 250
WRAPPED = {
    "llava": ("Llava", {"vision_config": CLIP, "image_token_index": IMAGE, "image_seq_length": 4}),
    **{
        kind: (
            name,
            {
                "vision_config": vision,
                "image_token_index": IMAGE,
                "image_grid_pinpoints": [[16, 16]],
                "vision_feature_select_strategy": strategy,
            },
        )
        for kind, name, vision, strategy in (
            ("llava_next", "LlavaNext", CLIP, "default"),
            ("llava_onevision", "LlavaOnevision", SIGLIP | {"model_type": "siglip_vision_model"}, "full"),
        )
    },
    "internvl": (
        "InternVL",
        {
            "vision_config": SIGLIP | {"image_size": [16, 16], "patch_size": [8, 8]},
            "image_token_id": IMAGE,
            "image_seq_length": 1,
        },
    ),
    "mistral3": ("Mistral3", {"vision_config": PIXTRAL, "image_token_index": IMAGE, "spatial_merge_size": 1}),
    "smolvlm": ("SmolVLM", {"vision_config": SIGLIP, "image_token_id": IMAGE, "scale_factor": 1}),
    "idefics3": ("Idefics3", {"vision_config": SIGLIP, "image_token_id": IMAGE, "scale_factor": 1}),
    "qwen3_5": (
        "Qwen3_5",
        {
            "vision_config": QWEN,
            "image_token_id": IMAGE,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {
            "vision_config": QWEN | {"deepstack_visual_indexes": [0, 1]},
            "image_token_id": IMAGE,
            "video_token_id": 251,
            "vision_start_token_id": 252,
            "vision_end_token_id": 253,
        },
    ),
    "gemma3": (
        "Gemma3",
        {
            "vision_config": SIGLIP,
            "mm_tokens_per_image": 4,
            "image_token_index": IMAGE,
            "boi_token_index": 251,
            "eoi_token_index": 252,
        },
    ),
}
EXPERTS, PRUNE = Recipe(shared=1, active=7, parts=8, restore="none"), Recipe(shared=8, active=0, parts=8)
NO_SHARED = Recipe(shared=0, active=8, parts=8, restore="none")
PAIRS = [
    ("llava", "llama", EXPERTS, "granitemoeshared"),
    ("llava", "qwen2", EXPERTS, "qwen2_moe"),
    ("llava_next", "mistral", NO_SHARED, "mixtral"),
    ("llava_onevision", "qwen2", EXPERTS, "qwen2_moe"),
    ("internvl", "qwen3", NO_SHARED, "qwen3_moe"),
    ("mistral3", "mistral", NO_SHARED, "mixtral"),
    ("smolvlm", "llama", EXPERTS, "granitemoeshared"),
    ("idefics3", "llama", NO_SHARED, "mixtral"),
    ("qwen3_5", "qwen3_5_text", EXPERTS, "qwen3_5_moe_text"),
    ("qwen3_vl", "qwen3_vl_text", NO_SHARED, "qwen3_vl_moe_text"),
    ("qwen3_vl", "qwen3_vl_text", PRUNE, "qwen3_vl_text"),
    ("gemma3", "gemma3_text", PRUNE, "gemma3_text"),
]


def save_wrapped(kind, text, folder):
    name, options = WRAPPED[kind]
    text_config = copy.deepcopy(TINY[text]).to_dict()
    config = getattr(transformers, f"{name}Config")(text_config=text_config, tie_word_embeddings=False, **options)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text("{}")
    return model


def image_inputs(kind, config):
    """Tokens of a prompt with an image in it, and what belongs to the image."""
    tokens = some_tokens(config.get_text_config(), rows=1, length=24) % 200
    pixels = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    count, more = 1 if kind == "internvl" else 4, {}
    if kind in ("smolvlm", "idefics3"):
        pixels = pixels[:, None]
    if kind in ("llava_next", "llava_onevision"):  # the whole image and one part of it, which is as large
        pixels, count = pixels[:, None].repeat(1, 2, 1, 1, 1), 4 + 4 + 2  # each row of a part ends with a token
        more["image_sizes"] = torch.tensor([[16, 16]])
    if kind == "mistral3":
        more["image_sizes"] = torch.tensor([[16, 16]])
    if kind in ("qwen3_5", "qwen3_vl"):
        pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(1))
        more["image_grid_thw"] = torch.tensor([[1, 4, 4]])
    tokens[0, 4 : 4 + count] = IMAGE
    if kind in ("qwen3_5", "qwen3_vl"):
        tokens[0, 3], tokens[0, 8] = 252, 253
    return tokens, {"pixel_values": pixels, **more}


def with_image(kind, model):
    """Logits of a prompt with an image in it."""
    tokens, inputs = image_inputs(kind, model.config)
    if kind in ("qwen3_5", "qwen3_vl"):
        inputs["mm_token_type_ids"] = (tokens == IMAGE).long()
    with torch.inference_mode():
        return model(input_ids=tokens, **inputs).logits


@pytest.mark.parametrize(("kind", "text", "recipe", "host"), PAIRS)
def test_the_text_model_becomes_sparse_and_the_rest_stays(kind, text, recipe, host, tmp_path, text_file, small):
    dense = save_wrapped(kind, text, tmp_path / "dense")
    out = tmp_path / "out"
    factorize(str(tmp_path / "dense"), out, recipe, text=str(text_file), settings=small)
    student, found = AutoModelForImageTextToText.from_pretrained(out, dtype=torch.float32, output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"] | found["mismatched_keys"]
    assert student.config.get_text_config().model_type == host
    # transformers has no class of Qwen3-VL's text model alone to be named.
    assert json.loads((out / "config.json").read_text())["text_config"]["architectures"] or kind == "qwen3_vl"
    tokens = some_tokens(dense.config.get_text_config())
    with torch.inference_mode():
        assert relative_error(student(input_ids=tokens).logits, dense(input_ids=tokens).logits) < 1e-4
    assert relative_error(with_image(kind, student), with_image(kind, dense)) < 1e-4
    assert (out / "preprocessor_config.json").exists()
    assert str(tmp_path) not in (out / "config.json").read_text()  # it may be published
    assert untouched(tmp_path / "dense") == untouched(out)


def untouched(folder) -> dict[str, bytes]:
    """The tensors of vision towers and projectors."""
    tensors = {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}
    parts = ("vision", "visual", "projector", "connector")
    return {name: tensor.numpy().tobytes() for name, tensor in tensors.items() if any(part in name for part in parts)}


@pytest.mark.parametrize(
    ("kind", "text", "recipe"), [("llava", "llama", "S2A2E8"), ("qwen3_vl", "qwen3_vl_text", "S0A2E8")]
)
def test_a_wrapped_student_heals(kind, text, recipe, tmp_path, text_file, small):
    save_wrapped(kind, text, tmp_path / "dense")
    out, healed = tmp_path / "out", tmp_path / "healed"
    factorize(str(tmp_path / "dense"), out, recipe, text=str(text_file), settings=small)
    settings = HealSettings(tokens=8192, validation_tokens=512, evaluations=2, learning_rate=5e-4, batch=8)
    heal(out, str(tmp_path / "dense"), healed, text=str(text_file), settings=settings)
    curve = [point["eval_loss"] for point in read_provenance(healed)["healing"]["curve"] if "eval_loss" in point]
    assert curve[-1] < 0.98 * curve[0]
    student, found = AutoModelForImageTextToText.from_pretrained(healed, output_loading_info=True)
    assert not found["missing_keys"] | found["unexpected_keys"] | found["mismatched_keys"]
    assert with_image(kind, student).isfinite().all()
    assert untouched(tmp_path / "dense") == untouched(healed)
    assert shapes(healed) == shapes(out)  # engines and exports read them from the files, not through transformers


def test_experts_that_transformers_saved_are_refused_for_what_they_are(tmp_path, text_file, small):
    """It reads them transposed and saves them as they are; when it does no more, the refusal can go."""
    save_wrapped("qwen3_vl", "qwen3_vl_text", tmp_path / "dense")
    factorize(str(tmp_path / "dense"), tmp_path / "out", "S0A2E8", text=str(text_file), settings=small)
    AutoModelForImageTextToText.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    byte_tokenizer().save_pretrained(tmp_path / "again")
    with pytest.raises(
        FactorLLMError, match=r"experts\.down_proj with rows and columns in each other's place, .*; swap"
    ):
        export_gguf(str(tmp_path / "again"), tmp_path / "out.gguf", "f32")


def shapes(folder) -> dict[str, torch.Size]:
    return {name: t.shape for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


@pytest.mark.parametrize("parts", [4, 2])
def test_square_experts_that_would_be_loaded_transposed_are_refused(parts, tmp_path, text_file, small):
    """Of a hidden size of 32 and an FFN of 64: experts of 16 neurons have 32 rows of gate and up, those of 32 too."""
    save_wrapped("qwen3_vl", "qwen3_vl_text", tmp_path / "dense")
    recipe = Recipe(shared=0, active=1, parts=parts)
    with pytest.raises(FactorLLMError, match=r"square .* stored transposed.* share of the FFN: 1/8($|;)"):
        factorize(str(tmp_path / "dense"), tmp_path / "out", recipe, text=str(text_file), settings=small)
    assert not (tmp_path / "out").exists()
    factorize(str(tmp_path / "dense"), tmp_path / "out", "S0A2E8", text=str(text_file), settings=small)


@pytest.mark.parametrize("parts", [4, 2])
def test_transformers_does_load_square_experts_wrongly(parts, tmp_path, text_file, small, monkeypatch):
    """What the refusal says is true; when it is no more, the refusal can go."""
    dense = save_wrapped("qwen3_vl", "qwen3_vl_text", tmp_path / "dense")
    monkeypatch.setattr("factorllm.hosts.qwen3_vl_moe._square", lambda *_: None)
    recipe = Recipe(shared=0, active=parts, parts=parts, restore="none")
    factorize(str(tmp_path / "dense"), tmp_path / "out", recipe, text=str(text_file), settings=small)
    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = some_tokens(dense.config.get_text_config())
    with torch.inference_mode():
        assert relative_error(student(input_ids=tokens).logits, dense(input_ids=tokens).logits) > 0.1


def test_predictors_of_more_tokens_are_left_out_and_said(tmp_path, text_file, small, capsys):
    save_wrapped("qwen3_5", "qwen3_5_text", tmp_path / "dense")
    weights = load_file(tmp_path / "dense/model.safetensors")
    save_file(weights | {"mtp.fc.weight": torch.zeros(4)}, tmp_path / "dense/model.safetensors", {"format": "pt"})
    out = tmp_path / "out"
    factorize(str(tmp_path / "dense"), out, EXPERTS, text=str(text_file), settings=small)
    assert "mtp.fc.weight" not in json.loads((out / "model.safetensors.index.json").read_text())["weight_map"]


def test_a_whole_model_that_says_it_is_quantised_is_refused(tmp_path):
    """As a text model is; a student would say so too, and could not be loaded."""
    save_wrapped("llava", "llama", tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "bitsandbytes", "load_in_8bit": True})
    with pytest.raises(FactorLLMError, match=r"is quantised \(bitsandbytes\) and cannot be read tensor by tensor"):
        open_model(str(tmp_path))


def test_older_names_are_read(tmp_path, text_file, small):
    """Checkpoints of before transformers 4.52 name the text model first."""
    dense = save_wrapped("llava", "llama", tmp_path / "dense")
    path = tmp_path / "dense/model.safetensors"
    renamed = {
        name.replace("model.language_model.", "language_model.model.").replace("lm_head", "language_model.lm_head"): t
        for name, t in load_file(path).items()
    }
    save_file(renamed, path, {"format": "pt"})
    factorize(str(tmp_path / "dense"), tmp_path / "out", EXPERTS, text=str(text_file), settings=small)
    student = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", dtype=torch.float32)
    tokens = some_tokens(dense.config.get_text_config())
    with torch.inference_mode():
        assert relative_error(student(input_ids=tokens).logits, dense(input_ids=tokens).logits) < 1e-4


def test_the_chat_template_of_an_older_processor_stays(tmp_path, text_file, small):
    """Of before transformers 4.48: in a file of its own that tokenizers do not read, beside which they may have one."""
    save_wrapped("llava", "llama", tmp_path / "dense")
    text_only = (tmp_path / "dense/chat_template.jinja").read_text()
    (tmp_path / "dense/chat_template.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    factorize(str(tmp_path / "dense"), tmp_path / "out", EXPERTS, text=str(text_file), settings=small)
    assert json.loads((tmp_path / "out/chat_template.json").read_text()) == {"chat_template": "{{ messages }}"}
    assert (tmp_path / "out/chat_template.jinja").read_text() == text_only


def test_the_chat_template_of_an_older_processor_is_in_the_file(tmp_path):
    save_wrapped("llava", "llama", tmp_path / "dense")
    (tmp_path / "dense/chat_template.jinja").unlink()
    path = tmp_path / "dense/chat_template.json"
    path.write_text(json.dumps({"chat_template": "{{ messages }}"}))
    export_gguf(str(tmp_path / "dense"), tmp_path / "out.gguf", "f32")
    fields = gguf.GGUFReader(tmp_path / "out.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == "{{ messages }}"
    path.write_text(json.dumps({"chat_template": [1]}))
    with pytest.raises(FactorLLMError, match=r"chat_template.json cannot be used \(its chat_template is no text"):
        open_model(str(tmp_path / "dense")).tokenizer()


@pytest.mark.parametrize(
    ("kind", "text", "recipe", "said"),
    [("llava", "llama", "S2A2E8", {}), ("qwen3_vl", "qwen3_vl_text", "S0A2E8", {"qwen3vlmoe.n_deepstack_layers": 2})],
)
def test_the_text_model_is_exported(kind, text, recipe, said, tmp_path, text_file, small):
    """As one GGUF file, beside which the dense model's own file of its vision tower goes on serving."""
    save_wrapped(kind, text, tmp_path / "dense")
    factorize(str(tmp_path / "dense"), tmp_path / "out", recipe, text=str(text_file), settings=small)
    written = export_gguf(str(tmp_path / "out"), tmp_path / "out.gguf", "f32", tokenizer=None)
    reader = gguf.GGUFReader(written.path)
    assert {key: field.contents() for key, field in reader.fields.items() if "deepstack" in key} == said
    names = {tensor.name for tensor in reader.tensors}
    assert {"token_embd.weight", "blk.0.ffn_gate_exps.weight", "output_norm.weight"} <= names
    assert not any(name.startswith(("v.", "mm.")) for name in names)


@pytest.mark.parametrize("kind", ["PaliGemma", "Qwen2_5_VL"])
def test_a_wrapper_that_is_not_known_is_refused(kind, tmp_path):
    getattr(transformers, f"{kind}Config")().save_pretrained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FactorLLMError, match="which is not supported yet; supported: llama"):
        open_model(str(tmp_path))
