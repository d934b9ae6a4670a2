"""Images answered by a student in llama.cpp, with the vision tower and projector of the dense model's mmproj file."""

import base64
import io
import types

import gguf
import openai
import pytest
import torch
from families import TINY
from forked import free_port
from PIL import Image
from test_export import byte_level_tokenizer
from test_wrappers import EXPERTS, IMAGE, save_wrapped
from transformers import AutoModelForImageTextToText

from factorllm import FactorLLMError, Settings, factorize, serve
from factorllm.exporting import export_gguf
from factorllm.serving.settings import ServeSettings

pytestmark = pytest.mark.engine

PROMPT, IMAGE_TOKENS = "the model", 4


def write_mmproj(model, path):
    """As llama.cpp's converters write LLaVA 1.5's."""
    vision = model.config.vision_config
    file = gguf.GGUFWriter(path, "clip")
    file.add_clip_has_vision_encoder(True)
    file.add_clip_projector_type("mlp")
    file.add_vision_image_size(vision.image_size)
    file.add_vision_patch_size(vision.patch_size)
    file.add_vision_embedding_length(vision.hidden_size)
    file.add_vision_feed_forward_length(vision.intermediate_size)
    file.add_vision_block_count(vision.num_hidden_layers)
    file.add_vision_head_count(vision.num_attention_heads)
    file.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    file.add_vision_projection_dim(vision.projection_dim)
    file.add_vision_image_mean([0.5] * 3)
    file.add_vision_image_std([0.5] * 3)
    tower = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision.num_hidden_layers)
    for name, weight in model.model.vision_tower.state_dict(prefix="vision_tower.vision_model.").items():
        if "post_layernorm" not in name:
            file.add_tensor(tower.get_name(name, (".weight", ".bias")), weight.numpy())
    for number, layer in ((0, "linear_1"), (2, "linear_2")):
        for name, weight in getattr(model.model.multi_modal_projector, layer).state_dict().items():
            file.add_tensor(f"mm.{number}.{name}", weight.numpy())
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.write_tensors_to_file()
    file.close()


@pytest.fixture(scope="module")
def made(tmp_path_factory, text_file):
    """A student of LLaVA as a folder and a GGUF file, and mmproj files: the model's own, and of another width."""
    root, config = tmp_path_factory.mktemp("mmproj"), TINY["llama"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "vocab_size", 300)
        model = save_wrapped("llava", "llama", root / "dense")
    tokenizer = byte_level_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    tokenizer.save_pretrained(root / "dense")
    small = Settings(tokens=2048, held_out_tokens=512, length=32)
    factorize(str(root / "dense"), root / "student", EXPERTS, text=str(text_file), settings=small)
    export_gguf(str(root / "student"), root / "student.gguf", "f32")
    write_mmproj(model, root / "mmproj.gguf")
    with torch.no_grad():
        model.model.multi_modal_projector.linear_2.weight.zero_()
        write_mmproj(model, root / "alike.gguf")  # all images are the projector's bias
    model.model.multi_modal_projector.linear_2 = torch.nn.Linear(32, 48)
    write_mmproj(model, root / "wide.gguf")
    return root


def answers(made, mmproj, monkeypatch, *colours):
    """The likeliest first tokens after an image of each colour and the prompt, by `serve`."""
    port, found = free_port(), []

    def ask():
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none")
        for colour in colours:
            picture = io.BytesIO()
            Image.new("RGB", (16, 16), colour).save(picture, "PNG")
            url = f"data:image/png;base64,{base64.b64encode(picture.getvalue()).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": PROMPT}]
            asked = {"messages": [{"role": "user", "content": content}], "max_tokens": 1, "temperature": 0}
            reply = client.chat.completions.create(model="any", logprobs=True, top_logprobs=8, **asked)
            found.append([choice.logprob for choice in reply.choices[0].logprobs.content[0].top_logprobs])

    event = types.SimpleNamespace(wait=ask)
    monkeypatch.setattr("factorllm.serving.serve.threading", types.SimpleNamespace(Event=lambda: event))
    said, settings = [], ServeSettings(port=port, context=64, threads=1)
    serve(made / "student.gguf", "llamacpp", settings=settings, say=said.append, mmproj=made / mmproj)
    assert f"--mmproj {made / mmproj}" in said[0]
    return found


def test_a_student_answers_of_images(made, monkeypatch):
    black, white = answers(made, "mmproj.gguf", monkeypatch, "black", "white")
    assert black != pytest.approx(white, abs=0.1)


def test_what_stands_for_an_image_is_read_as_transformers_reads_it(made, monkeypatch):
    student = AutoModelForImageTextToText.from_pretrained(made / "student")
    tokens = [IMAGE] * IMAGE_TOKENS + byte_level_tokenizer()(PROMPT).input_ids
    with torch.no_grad():
        student.model.multi_modal_projector.linear_2.weight.zero_()
        pixels = torch.ones(1, 3, 16, 16)
        wanted = student(torch.tensor([tokens]), pixel_values=pixels).logits[0, -1].log_softmax(-1)
    (found,) = answers(made, "alike.gguf", monkeypatch, "white")
    assert found == pytest.approx(wanted.topk(8).values.tolist(), abs=1e-2)  # f16 in the cache


@pytest.mark.parametrize(
    ("mmproj", "said"),
    [
        ("gone.gguf", "gone.gguf is not there"),
        ("student.gguf", "is a model of architecture granitemoe, not a vision tower"),
        ("text.gguf", "text.gguf cannot be used .*fetch it again"),
        ("wide.gguf", r"with .*wide\.gguf, which must be the dense model's own"),
    ],
)
def test_what_is_no_such_file_is_refused(mmproj, said, made):
    (made / "text.gguf").write_text("no such file")
    with pytest.raises(FactorLLMError, match=said):
        serve(made / "student.gguf", "llamacpp", settings=ServeSettings(port=free_port()), mmproj=made / mmproj)


@pytest.mark.parametrize(
    ("engine", "more", "said"),
    [
        ("vllm", {}, "--mmproj works through llama.cpp, not in vllm"),
        ("llamacpp", {"lossless": "dense"}, "--lossless with --mmproj was never measured"),
    ],
)
def test_where_it_has_no_place_it_is_refused(engine, more, said, made):
    with pytest.raises(FactorLLMError, match=said):
        serve(made / "student", engine, mmproj=made / "mmproj.gguf", **more)
