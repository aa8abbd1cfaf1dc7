import copy
import functools
import http.server
import shutil
import threading
import weakref

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.utils import logging

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor, ClipMiniTextModel, ClipMiniVisionModel
from modeling_clipmini import modeling_clipmini as module

TEXTS = ["a cat", "a very long caption about nothing much at all", "", "dog"]


@pytest.fixture(scope="module")
def loaded(tiny_folder):
    return ClipMiniModel.from_pretrained(tiny_folder)


@pytest.fixture
def model(loaded):
    return copy.deepcopy(loaded)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Five image files that differ."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(5):
        image = Image.linear_gradient("L").resize((60 + 10 * number, 50)).rotate(60 * number).convert("RGB")
        image.save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_texts_are_what_processor_and_model_give(model):
    with torch.no_grad():
        expected = model(**model.processor(text=TEXTS)).text_embeds.numpy()
    embeds = model.encode_text(TEXTS)
    assert embeds.dtype == np.float32
    assert np.allclose(embeds, expected, atol=1e-6)
    assert np.allclose(np.linalg.norm(embeds, axis=1), 1)


def test_images_are_what_processor_and_model_give(model, images):
    opened = [Image.open(path) for path in images]
    with torch.no_grad():
        expected = model(**model.processor(images=opened)).image_embeds.numpy()
    embeds = model.encode_image(opened)
    assert embeds.dtype == np.float32
    assert np.allclose(embeds, expected, atol=1e-6)
    assert np.array_equal(model.encode_image(images), embeds)  # paths
    assert np.array_equal(model.encode_image(map(str, images)), embeds)  # any iterable


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_the_order_is_kept_whatever_the_batches(batch_size, model, images):
    texts = [letter * (1 + 7 * number % 5) for number, letter in enumerate("abcdefghij")]
    alone = np.stack([model.encode_text(text) for text in texts])
    assert np.allclose(model.encode_text(texts, batch_size), alone, atol=1e-6)
    alone = np.stack([model.encode_image(path) for path in images])
    assert np.allclose(model.encode_image(images, batch_size), alone, atol=1e-6)


def test_texts_of_like_length_share_a_batch(model, monkeypatch):
    shapes = []
    features = model.get_text_features
    monkeypatch.setattr(model, "get_text_features", lambda **inputs: shapes.append(inputs) or features(**inputs))
    model.encode_text(["a", "b" * 40, "c", "d" * 40], batch_size=2)
    assert [batch["input_ids"].shape[1] for batch in shapes] == [42, 3]
    assert all(batch["attention_mask"].all() for batch in shapes)


def test_one_input_gives_one_row(model, images):
    assert model.encode_text("a cat").shape == model.encode_image(images[0]).shape == (16,)
    assert model.encode_text(["a cat"]).shape == model.encode_image([images[0]]).shape == (1, 16)
    assert model.encode_text([]).shape == model.encode_image([]).shape == (0, 16)
    assert model.encode_text([], truncate_dim=3).shape == (0, 3)


def test_tensors_on_request_and_float32_whatever_the_model_runs_in(model, images):
    assert torch.equal(model.encode_text(TEXTS, convert_to_tensor=True), torch.tensor(model.encode_text(TEXTS)))
    expected = model.encode_image(images)
    embeds = model.to(torch.bfloat16).encode_image(images, convert_to_tensor=True)
    assert embeds.dtype == torch.float32
    assert torch.allclose(embeds.norm(dim=1), torch.ones(5))
    assert np.allclose(embeds, expected, atol=0.05)


def test_a_truncated_embedding_has_length_one_again(model, images):
    for whole, cut in (
        (model.encode_text(TEXTS), model.encode_text(TEXTS, truncate_dim=5)),
        (model.encode_image(images), model.encode_image(images, truncate_dim=5)),
    ):
        prefix = whole[:, :5]
        assert np.allclose(cut, prefix / np.linalg.norm(prefix, axis=1, keepdims=True), atol=1e-6)


def test_a_half_encodes_its_side(tiny_folder, model, images):
    vision, text = ClipMiniVisionModel.from_pretrained(tiny_folder), ClipMiniTextModel.from_pretrained(tiny_folder)
    assert np.allclose(vision.encode_image(images), model.encode_image(images), atol=1e-6)
    assert np.allclose(text.encode_text(TEXTS), model.encode_text(TEXTS), atol=1e-6)
    assert not hasattr(vision, "encode_text")
    assert not hasattr(text, "encode_image")


def test_one_batch_of_images_is_read_at_a_time(model, images, monkeypatch):
    events = []
    features = model.get_image_features
    read = module.read_named
    monkeypatch.setattr(module, "read_named", lambda *args, **kw: events.append("read") or read(*args, **kw))
    monkeypatch.setattr(model, "get_image_features", lambda *args, **kw: events.append("run") or features(*args, **kw))
    model.encode_image(images, batch_size=2)
    assert events == ["read", "read", "run", "read", "read", "run", "read", "run"]


def test_training_mode_is_left_and_entered_again(model):
    expected = model.encode_text(TEXTS)
    model.train()
    assert np.array_equal(model.encode_text(TEXTS), expected)  # no dropout
    assert model.training
    with pytest.raises(ValueError, match=r"nowhere\.png: does not exist"):
        model.encode_image("nowhere.png")
    assert model.training
    assert model.text_model.training


def test_images_that_come_one_by_one_are_held_a_batch_at_a_time(model, images):
    alive = []

    def come():
        for path in images:
            alive[:] = [reference for reference in alive if reference() is not None]
            assert len(alive) <= 2
            image = Image.open(path)
            alive.append(weakref.ref(image))
            yield image

    embeds = model.encode_image(come(), batch_size=1)
    assert np.allclose(embeds, model.encode_image(images), atol=1e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16", "L", "P"])
def test_a_path_is_as_good_as_an_image(mode, model, tmp_path):
    image = Image.new(mode, (60, 60), {"RGBA": (255, 0, 0, 0), "LA": (0, 0), "I;16": 30000}.get(mode, 200))
    image.save(tmp_path / "image.png")
    expected = model.encode_image(image)
    assert np.array_equal(model.encode_image(tmp_path / "image.png"), expected)
    if "A" in mode:
        assert np.array_equal(expected, model.encode_image(Image.new("RGB", (60, 60), "white")))


@pytest.fixture(scope="module")
def address(images):
    """The folder of images, served on loopback."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=images[0].parent)
    handler.log_message = lambda *args: None
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_an_address_is_as_good_as_a_path(model, images, address):
    assert np.array_equal(model.encode_image(f"{address}/3.png"), model.encode_image(images[3]))
    with pytest.raises(ValueError, match=r"^http.*/9\.png: cannot be fetched \(HTTP Error 404: File not found\)"):
        model.encode_image([f"{address}/9.png"])


def test_a_broken_image_is_named(model, images, tmp_path):
    text, cut = tmp_path / "text.png", tmp_path / "cut.png"
    text.write_text("no image")
    cut.write_bytes(images[4].read_bytes()[:200])
    for broken, message in (
        (tmp_path / "none.png", r"none\.png: does not exist"),
        (text, r"text\.png: is not an image"),
        (cut, r"cut\.png: is truncated"),
        (Image.open(cut), r"cut\.png: is truncated"),
        (Image.new("RGB", (0, 5)), r"image number 3: has no pixels"),
    ):
        with pytest.raises(ValueError, match=message):
            model.encode_image([*images[:2], broken])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.encode_text(5), "type int is not allowed; pass str, or a list"),
        (lambda model: model.encode_text(["a", None]), "number 2 is of type NoneType; pass str"),
        (lambda model: model.encode_image([b"bytes"]), "number 1 is of type bytes; pass str, PathLike, Image"),
        (lambda model: model.encode_text("a", batch_size=0), "batch_size=0 is not allowed; .* at least 1"),
        (lambda model: model.encode_text("a", truncate_dim=17), "truncate_dim=17 .* from 1 to 16"),
        (lambda model: model.encode_image([], truncate_dim=2.0), "truncate_dim=2.0 .* whole number"),
    ],
)
def test_what_is_not_allowed_is_said(call, message, model):
    with pytest.raises(ValueError, match=message):
        call(model)


@pytest.mark.parametrize(("show", "is_drawn"), [(True, True), (False, False), (None, False)])
def test_the_bar(show, is_drawn, model, capsys, monkeypatch):
    monkeypatch.setattr(logging, "_tqdm_active", True)  # which other tests may have switched off
    model.processor  # noqa: B018 - loading draws nothing, and is done here
    capsys.readouterr()
    model.encode_text(TEXTS, show_progress_bar=show)
    assert ("4/4" in capsys.readouterr().err) == is_drawn


def test_the_processor_is_read_once_and_can_be_set(model, tiny_processor):
    assert isinstance(model.processor, ClipMiniProcessor)
    assert model.processor is model.processor
    model.processor = tiny_processor
    assert model.processor is tiny_processor


def test_a_model_from_nowhere_says_how_to_set_a_processor(tiny_model, tiny_processor, tiny_folder, tmp_path):
    del tiny_model.processor
    assert not hasattr(tiny_model, "processor")
    with pytest.raises(AttributeError, match=r"not loaded from anywhere.*model\.processor = AutoProcessor"):
        tiny_model.encode_text("a cat")
    tiny_model.processor = tiny_processor
    assert tiny_model.encode_text("a cat").shape == (16,)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_folder / name, tmp_path / name)
    with pytest.raises(AttributeError, match=r"has no usable processor .*model\.processor = AutoProcessor"):
        ClipMiniModel.from_pretrained(tmp_path).encode_text("a cat")


def test_the_processor_is_of_the_models_own_revision(tiny_folder, tmp_path):
    """A repository whose two revisions prepare images differently, as the Hub's cache holds it."""
    repository = tmp_path / "cache" / "models--org--tiny"
    for branch, commit, size in (("main", "a" * 40, 64), ("old", "b" * 40, 32)):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / branch).write_text(commit)
        snapshot = repository / "snapshots" / commit
        shutil.copytree(tiny_folder, snapshot / "sub")
        processor = ClipMiniProcessor.from_pretrained(tiny_folder)
        processor.image_processor = CLIPImageProcessor(crop_size=size)
        processor.save_pretrained(snapshot / "sub")
    place = {"cache_dir": tmp_path / "cache", "subfolder": "sub"}
    for revision, size in (("main", 64), ("old", 32)):
        model = ClipMiniModel.from_pretrained("org/tiny", revision=revision, **place)
        assert model.processor.image_processor.crop_size["height"] == size
