"""`--images`: what the FFNs of vision-language models do with image tokens is calibrated on, and measured, too."""

import json
import shutil
import sys

import pytest
import torch
import transformers
from conftest import byte_tokenizer, edit_json, relative_error, some_tokens, words
from PIL import Image
from test_factorize import contents
from test_wrappers import IMAGE, PAIRS, image_inputs, save_wrapped, untouched
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from factorllm import FactorLLMError, Recipe, factorize
from factorllm.cli import app
from factorllm.convert.layer import convert_layer
from factorllm.convert.vision import SEEING, Document, Front
from factorllm.dense import open_model
from factorllm.dense.ends import Ends
from factorllm.dense.layer import LayerLoader
from factorllm.dense.sequences import Sequences
from factorllm.student.read import read_provenance
from factorllm.text.pictures import Picture, open_picture, parted, read_pictures

SIZE = {"height": 16, "width": 16}
TEMPLATE = (
    "{% for m in messages %}<s>{% for c in m.content %}{{ '<image>' if c.type == 'image' else c.text }}{% endfor %}"
    "{% endfor %}"
)


def tokenizer_with_image():
    """The byte-level tokenizer, in which `<image>` is the token that the tiny models take for an image's."""
    tokenizer = byte_tokenizer()
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    (old,) = (token for token, number in vocabulary.items() if number == IMAGE)
    vocabulary["<image>"] = vocabulary.pop(old)
    state["added_tokens"] = [
        {"id": IMAGE, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
         "special": True}
    ]  # fmt: skip
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=type(tokenizer.backend_tokenizer).from_str(json.dumps(state)),
        bos_token="<s>", eos_token="</s>", extra_special_tokens={"image_token": "<image>"},
    )  # fmt: skip
    assert made.convert_tokens_to_ids("<image>") == IMAGE
    return made


def processor_of(kind):
    tokenizer = tokenizer_with_image()
    if kind.startswith("qwen"):
        # Qwen's own wants torchvision for videos; of images it makes the same.
        images = transformers.Qwen2VLImageProcessor(
            patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 1024}
        )
        return transformers.PaddleOCRVLProcessor(images, tokenizer, chat_template=TEMPLATE)
    if kind in ("llava",):
        images = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=SIZE)
        options = {"patch_size": 8, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        return transformers.LlavaProcessor(images, tokenizer, **options)
    raise AssertionError(kind)


def save_seeing(kind, text, folder):
    """A tiny vision-language model with its processor."""
    model = save_wrapped(kind, text, folder)
    (folder / "preprocessor_config.json").unlink()
    processor_of(kind).save_pretrained(folder)
    return model


@pytest.fixture
def pictures(tmp_path):
    """Twenty images, half of them with captions, in two sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = torch.Generator().manual_seed(0)
    for number in range(20):
        size = (16, 16) if number % 2 else (24, 16)
        pixels = torch.randint(0, 256, (size[1], size[0], 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{number:02d}.{'png' if number % 3 else 'jpg'}")
        if number % 2:
            (folder / f"{number:02d}.txt").write_text(words(5, number))
    return folder


MODELS = [("llava", "llama", "S2A2E8"), ("qwen3_5", "qwen3_5_text", "S2A2E8"), ("qwen3_vl", "qwen3_vl_text", "S0A2E8")]


@pytest.mark.parametrize(("kind", "text", "recipe"), MODELS)
def test_images_are_calibrated_on_and_measured(kind, text, recipe, tmp_path, text_file, small, pictures):
    save_seeing(kind, text, tmp_path / "dense")
    out, most = tmp_path / "out", small.model_copy(update={"tokens": 4096})
    summary = factorize(str(tmp_path / "dense"), out, recipe, text=str(text_file), images=pictures, settings=most)
    images = read_provenance(out)["data"]["images"]
    assert images["origin"] == "pictures"
    assert (images["calibration_images"], images["held_out_images"]) == (18, 2)
    assert images["calibration_image_tokens"] >= 4 * 18
    assert summary.images == images
    errors = [layer["ffn_error"] for layer in read_provenance(out)["layers"]]
    assert all(0 < error[kind] < 1.5 for error in errors for kind in ("text", "image"))
    student = AutoModelForImageTextToText.from_pretrained(out)
    assert student.config.model_type
    assert untouched(tmp_path / "dense") == untouched(out)


TEXTS = {kind: text for kind, text, *_ in PAIRS}


def seen(kind, folder):
    """A front of a tiny model, and a document and a sequence of 48 tokens that begins with an image."""
    model = save_wrapped(kind, TEXTS[kind], folder)
    source = open_model(str(folder))
    tokens, inputs = image_inputs(kind, model.config)
    document = Document(Picture(folder / "drawn.png", None), tokens[0], tokens[0] == IMAGE, inputs)
    more = some_tokens(source.config, rows=1, length=24, seed=3)[0] % 200
    return model, source, document, torch.cat([tokens[0], more])


@pytest.mark.parametrize("kind", SEEING)
def test_a_sequence_with_an_image_is_streamed_as_transformers_computes_it(kind, tmp_path):
    model, source, document, tokens = seen(kind, tmp_path)
    cpu = torch.device("cpu")
    Front(source, len(tokens), torch.float32, cpu).write(document, tokens, tmp_path / "seen.safetensors")
    sequences = Sequences(torch.stack([tokens % 200, tokens]), {1: tmp_path / "seen.safetensors"})
    run, ends = slice(0, 2), Ends(source, cpu)
    stream, beside = sequences.embed(run, ends.embed), sequences.beside(run)
    loader = LayerLoader(source, len(tokens), torch.float32, cpu)
    for index in range(source.config.num_hidden_layers):
        layer = loader.load(index)
        middle, inputs = layer.attend(stream, beside)
        stream = layer.after(stream, middle, layer.ffn.hidden(inputs) @ layer.ffn.down.T, beside)
    inputs = document.inputs
    if kind.startswith("qwen"):
        inputs = inputs | {"mm_token_type_ids": (tokens[None] == IMAGE).long()}
    with torch.inference_mode():
        wanted = [model(input_ids=tokens[None] % 200), model(input_ids=tokens[None], **inputs)]
    for row, right in zip(stream, wanted, strict=True):
        assert relative_error(ends.logits(row), right.logits[0]) < 1e-5


@pytest.mark.parametrize(("kind", "broken"), [("qwen3_vl", "_added"), ("qwen3_vl", "_positions"), ("llava", "embed")])
def test_what_is_streamed_otherwise_than_transformers_computes_it_stops_the_run(kind, broken, tmp_path, monkeypatch):
    _, source, document, tokens = seen(kind, tmp_path)
    front = Front(source, len(tokens), torch.float32, torch.device("cpu"))
    path = tmp_path / "seen.safetensors"
    front.write(document, tokens, path)
    sequences = Sequences(tokens[None], {0: path})
    front.check(document, sequences, 0)
    right = Sequences.embed
    wrong = {"embed": lambda *arguments: right(*arguments) * 1.01}.get(broken, lambda *_: None)
    monkeypatch.setattr(Sequences, broken, wrong)
    with pytest.raises(FactorLLMError, match="cannot be streamed exactly: the stream before layer"):
        front.check(document, sequences, 0)


def ffn_errors(dense, student, inputs):
    """Of each layer, the squared error of the student's FFN on what the dense one reads of image tokens."""
    reads = []
    layers = dense.get_decoder().layers
    hooks = [layer.mlp.register_forward_hook(lambda _, args, out: reads.append((args[0], out))) for layer in layers]
    with torch.inference_mode():
        dense(**inputs)
        for hook in hooks:
            hook.remove()
        is_image = inputs["input_ids"] == IMAGE
        found = []
        for layer, (x, wanted) in zip(student.get_decoder().layers, reads, strict=True):
            got = layer.mlp(x)
            found.append(((got - wanted)[is_image].square().sum() / wanted[is_image].square().sum()).item())
    return found


def test_image_tokens_are_kept_better_when_they_are_calibrated_on(tmp_path, text_file, small, pictures):
    dense = save_seeing("llava", "qwen2", tmp_path / "dense")
    settings = small.model_copy(update={"length": 32})
    errors = {}
    inputs = processor_of("llava")(
        text=["<image>\nwhat?"], images=[Image.new("RGB", (16, 16), "teal")], return_tensors="pt"
    )
    for name, images in (("text", None), ("images", pictures)):
        recipe = Recipe(shared=2, active=2, parts=8, restore="local")
        factorize(
            str(tmp_path / "dense"), tmp_path / name, recipe, text=str(text_file), images=images, settings=settings
        )
        errors[name] = ffn_errors(dense, AutoModelForImageTextToText.from_pretrained(tmp_path / name), inputs)
    assert sum(errors["images"]) < 0.9 * sum(errors["text"])


def test_a_killed_run_goes_on_and_looks_at_no_image_twice(tmp_path, text_file, small, pictures, monkeypatch):
    save_seeing("qwen3_vl", "qwen3_vl_text", tmp_path / "dense")

    def run(out, images=pictures):
        factorize(str(tmp_path / "dense"), out, "S0A2E8", text=str(text_file), images=images, settings=small)

    out = tmp_path / "out" / "student"
    run(tmp_path / "whole" / "student")
    right, converted = convert_layer, []

    def killed(task):
        converted.append(task)
        if len(converted) == 3:
            raise KeyboardInterrupt
        return right(task)

    monkeypatch.setattr("factorllm.convert.factorize.convert_layer", killed)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    monkeypatch.setattr("factorllm.convert.mixing.Front", None)
    others = shutil.copytree(pictures, tmp_path / "others" / "pictures")
    Image.new("RGB", (16, 16)).save(others / "one.png")
    with pytest.raises(FactorLLMError, match="other images"):
        run(out, others)
    run(out)
    assert contents(out) == contents(tmp_path / "whole" / "student")
    run(out)  # done already
    with pytest.raises(FactorLLMError, match="other images"):
        run(out, None)


def test_the_commands_say_how_each_kind_of_token_fares(tmp_path, text_file, pictures):
    save_seeing("llava", "qwen2", tmp_path / "dense")
    out = tmp_path / "out"
    options = ["--text", str(text_file), "--images", str(pictures), "--tokens", "2048"]
    made = CliRunner().invoke(app, ["prune", str(tmp_path / "dense"), "-o", str(out), *options])
    assert made.exit_code == 0, made.output
    found = read_provenance(out)["data"]["images"]
    for printed in (made.stdout, CliRunner().invoke(app, ["inspect", str(out)]).stdout):
        assert "images of pictures" in printed
        (text,) = (line.split() for line in printed.splitlines() if line.strip().startswith("text "))
        (image,) = (line.split() for line in printed.splitlines() if line.strip().startswith("image "))
        assert text[1] == f"{found['calibration_text_tokens']:,}"
        assert image[2] == f"{found['held_out_image_tokens']:,}"
        assert 0 < float(image[3]) < 1.5
    assert CliRunner().invoke(app, ["report", str(out)]).exit_code == 0
    page = (out / "report/index.html").read_text()
    assert f'<th scope="row">image</th><td>{found["calibration_image_tokens"]:,}</td>' in page
    assert "of pictures" in (out / "README.md").read_text()


def test_held_out_images_are_others_and_no_image_counts_twice(pictures):
    shutil.copy(pictures / "00.jpg", pictures / "again.jpg")
    found = read_pictures(pictures)
    assert len(found) == 20
    assert sum(picture.caption is not None for picture in found) == 10
    learned, held_out = parted(found, seed=0, most_held_out=8)
    assert len(held_out) == 2
    assert {picture.path for picture in learned} | {picture.path for picture in held_out} == {p.path for p in found}
    assert not {picture.path for picture in learned} & {picture.path for picture in held_out}
    assert parted(found, seed=1, most_held_out=8)[1] != held_out


def test_an_image_of_too_many_pixels_is_not_called_damaged(tmp_path, monkeypatch):
    Image.new("RGB", (8, 4)).save(tmp_path / "large.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 15)
    with pytest.raises(FactorLLMError, match=r"large\.png has more pixels than Pillow opens, 30; scale it down"):
        open_picture(tmp_path / "large.png")


def test_an_image_is_upright_as_transformers_loads_it(tmp_path):
    """Phones write what the sensor saw, and beside it how it was held."""
    image = Image.effect_noise((24, 16), 100)
    turned = Image.Exif()
    turned[0x0112] = 6
    image.save(tmp_path / "turned.png", exif=turned)
    found = open_picture(tmp_path / "turned.png")
    assert found.size == (16, 24)
    assert found.tobytes() == transformers.image_utils.load_image(str(tmp_path / "turned.png")).tobytes()


def no_processor(dense, pictures):
    (dense / "processor_config.json").unlink()


def no_images(dense, pictures):
    for path in pictures.glob("*.*g"):
        path.unlink()


def unreadable(dense, pictures):
    (pictures / "07.png").write_bytes((pictures / "07.png").read_bytes()[:100])


def long_caption(dense, pictures):
    for path in pictures.glob("*.txt"):
        path.write_text("a" * 100)


def one_image(dense, pictures):
    for path in sorted(pictures.glob("*.*g"))[1:]:
        path.unlink()


def another_image_token(dense, pictures):
    edit_json(dense / "config.json", image_token_index=7, image_token_id=7)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (no_processor, r"no processor of images .* copy it there"),
        (no_images, r"--images .*pictures holds no image; put \.png"),
        (unreadable, r"image .*07\.png cannot be used \(.*; remove it"),
        (long_caption, r"image .*png and its words are 1\d\d tokens, and .* reads sequences of 64; make"),
        (one_image, r"holds one image only"),
        (another_image_token, r"puts no image token \(number 7\)"),
        (lambda dense, pictures: shutil.rmtree(pictures), r"--images .*pictures is no folder"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(change, says, tmp_path, text_file, small, pictures):
    save_seeing("llava", "llama", tmp_path / "dense")
    change(tmp_path / "dense", pictures)
    with pytest.raises(FactorLLMError, match=says):
        factorize(
            str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), images=pictures, settings=small
        )
    assert not (tmp_path / "out").exists()


def test_models_whose_images_are_not_looked_at_are_refused(tmp_path, dense_folder, text_file, small, pictures):
    save_wrapped("gemma3", "gemma3_text", tmp_path / "gemma")
    for model, says in (
        (dense_folder, "reads no images: it is a text model"),
        (tmp_path / "gemma", "images of gemma3"),
    ):
        with pytest.raises(FactorLLMError, match=f"{says}.* leave --images out"):
            factorize(str(model), tmp_path / "out", "S4A0E8", text=str(text_file), images=pictures, settings=small)


@pytest.mark.parametrize("missing", ["torchvision", "num2words"])
def test_a_processor_that_wants_a_package_says_what_to_install(
    missing, tmp_path, text_file, small, pictures, monkeypatch
):
    def wants(*_, **__):
        raise ImportError(f"this processor requires {missing}")

    save_seeing("llava", "llama", tmp_path / "dense")
    monkeypatch.setattr("factorllm.dense.pretrained.AutoProcessor.from_pretrained", wants)
    monkeypatch.setattr("factorllm.dense.pretrained.find_spec", lambda name: None if name == missing else name)
    says = rf"requires {missing}\); {missing} not installed, which it may want: pip install 'factorllm\[images\]'; else"
    with pytest.raises(FactorLLMError, match=says):
        factorize(
            str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), images=pictures, settings=small
        )


def test_without_pillow_the_user_is_told_what_to_install(tmp_path, text_file, small, pictures, monkeypatch):
    save_seeing("llava", "llama", tmp_path / "dense")
    monkeypatch.setattr("factorllm.convert.vision.load_processor", lambda *_: None)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(FactorLLMError, match=r"--images needs Pillow: pip install 'factorllm\[images\]'"):
        factorize(
            str(tmp_path / "dense"), tmp_path / "out", "S2A2E8", text=str(text_file), images=pictures, settings=small
        )
