"""A model in ONNX Runtime gives the answers that it gives in torch."""

import io
import json
import shutil
import sys

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import clipmini
from clipmini.cli import app
from clipmini.files import weights_sha256
from clipmini.indexing.index import describe_model
from clipmini.inference.bank import Bank, save_bank
from clipmini.inference.encoders import load_encoder
from modeling_clipmini.handler import RequestHandler

SAMPLE = "offline:photos/test"
LABELS = ["a dog", "a boat", "a bird"]


@pytest.fixture(scope="module")
def exported(tiny_folder, tmp_path_factory):
    """A tiny model with graphs, and a bank. Read only."""
    folder = tmp_path_factory.mktemp("onnx") / "model"
    shutil.copytree(tiny_folder, folder)
    vectors = torch.nn.functional.normalize(torch.randn(20, 16, generator=torch.Generator().manual_seed(0)), dim=1)
    save_bank(Bank(vectors.half(), vectors.half(), 10.0), folder)
    clipmini.export(folder, int8=True)
    return folder


@pytest.fixture
def copied(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    return file


def test_vectors_are_those_of_torch(exported, photo):
    ours, other = clipmini.load(exported, "cpu"), clipmini.load(exported, engine="onnx")
    captions = ["a", "a red bicycle in the rain", "word " * 100]
    assert np.allclose(ours.encode_text(captions), other.encode_text(captions), atol=1e-5)
    assert np.allclose(ours.encode_image([photo] * 3), other.encode_image([photo] * 3), atol=1e-5)
    assert other.encode_text("a", truncate_dim=4, convert_to_tensor=True).shape == (4,)
    assert other.get_logit_scale().item() == pytest.approx(ours.get_logit_scale().item())


def test_the_handler_answers_alike(exported, photo):
    buffer = io.BytesIO()
    Image.open(photo).save(buffer, "PNG")
    request = {"inputs": {"image": buffer.getvalue()}, "parameters": {"candidate_labels": LABELS}}
    requests = (request, {"inputs": ["a dog", "a much longer text"]})
    by_torch, by_onnx = (RequestHandler(clipmini.load(exported, "cpu", engine=name)) for name in ("torch", "onnx"))
    for asked in requests:
        ours, other = by_torch(asked), by_onnx(asked)
        if isinstance(ours[0], dict):
            assert [item["label"] for item in ours] == [item["label"] for item in other]
            ours, other = ([item["score"] for item in items] for items in (ours, other))
        assert np.allclose(ours, other, atol=1e-4)


def test_the_front_door_answers_alike(exported, photo):
    for call in (
        lambda engine: clipmini.classify(exported, photo, LABELS, engine=engine).to_dict(),
        lambda engine: clipmini.search(exported, SAMPLE, "a dog", 3, engine=engine, use_index=False).to_dict(),
        lambda engine: clipmini.evaluate(exported, SAMPLE, engine=engine).results["metrics"],
    ):
        ours, other = call("torch"), call("onnx")
        assert json.dumps(round_floats(ours)) == json.dumps(round_floats(other))
    command = clipmini.evaluate(exported, SAMPLE, engine="onnx").results["command"]
    assert command.endswith("--engine onnx")


def round_floats(value):
    if isinstance(value, dict):
        return {key: round_floats(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [round_floats(item) for item in value]
    return round(value, 3) if isinstance(value, float) else value


class TestIndex:
    def test_one_engine_goes_on_with_the_index_of_the_other(self, exported, tmp_path):
        index = clipmini.open_index(tmp_path / "index", exported)
        assert index.add(SAMPLE).num_embedded == 32
        other = clipmini.open_index(tmp_path / "index", exported, engine="onnx")
        assert other.add(SAMPLE).num_embedded == 0
        assert [hit.path for hit in other.search("a dog")[0]] == [hit.path for hit in index.search("a dog")[0]]
        assert other.search("a dog")[0].scoring == "normalized"  # with the bank

    def test_int8_is_another_model(self, exported, tmp_path):
        clipmini.open_index(tmp_path / "index", exported)
        with pytest.raises(ValueError, match="engine that made the index"):
            clipmini.open_index(tmp_path / "index", exported, engine="onnx-int8").search("a dog")
        described = {engine: describe_model(load_encoder(exported, engine)) for engine in ("torch", "onnx")}
        assert described["torch"] == described["onnx"] != describe_model(load_encoder(exported, "onnx-int8"))

    def test_the_kept_indexes_of_a_folder_do_not_replace_each_other(self, exported, caplog):
        for engine in ("onnx-int8", "torch", "onnx-int8"):
            clipmini.search(exported, SAMPLE, "a dog", 1, engine=engine)
        assert "made anew" not in caplog.text


def test_int8_takes_the_text_graph_of_8_bits_and_the_image_graph_there_is(exported):
    whole, small = (clipmini.load(exported, engine=engine) for engine in ("onnx", "onnx-int8"))
    cosine = float(whole.encode_text("a red bicycle") @ small.encode_text("a red bicycle"))
    assert 0.9 < cosine < 0.9999999
    image = Image.new("RGB", (64, 64), "red")
    assert np.array_equal(whole.encode_image(image), small.encode_image(image))
    assert (whole.quantization, len(small.quantization)) == ("", 64)
    assert whole.weights_sha256 == small.weights_sha256 == weights_sha256(exported)


class TestRefused:
    def test_without_graphs(self, tiny_folder):
        with pytest.raises(
            ValueError, match=r"There is no .*vision_model\.onnx; write .* clipmini export .* --to onnx"
        ):
            clipmini.load(tiny_folder, engine="onnx")

    def test_graphs_of_other_weights(self, copied):
        model = clipmini.load(copied, "cpu")
        model.logit_scale.data += 1
        model.save_pretrained(copied)
        with pytest.raises(ValueError, match="are of other weights than those beside them; write the graphs anew"):
            clipmini.load(copied, engine="onnx")

    def test_a_damaged_graph(self, copied):
        file = copied / "onnx" / "text_model.onnx"
        file.write_bytes(file.read_bytes()[:1000])
        with pytest.raises(ValueError, match=r"text_model\.onnx cannot be loaded"):
            clipmini.load(copied, engine="onnx")

    def test_graphs_of_another_program(self, copied):
        shutil.copy(copied / "onnx" / "vision_model.onnx", copied / "onnx" / "text_model.onnx")
        with pytest.raises(
            ValueError, match="another graph than clipmini's, which turns input_ids and attention_mask"
        ):
            clipmini.load(copied, engine="onnx")

    def test_graphs_that_do_not_say_what_they_are_of(self, copied):
        graph = onnx.load(copied / "onnx" / "text_model.onnx")
        del graph.metadata_props[:]
        onnx.save(graph, copied / "onnx" / "text_model.onnx")
        with pytest.raises(ValueError, match="do not say that they are of one model's weights"):
            clipmini.load(copied, engine="onnx")

    def test_engines_that_do_not_exist_or_do_not_fit(self, exported, clip_folder):
        for call, message in (
            (lambda: clipmini.load(exported, engine="tensorrt"), "use one of auto, torch, onnx, onnx-int8"),
            (lambda: clipmini.load(exported, "cuda", engine="onnx"), "computes on the CPU"),
            (lambda: clipmini.classify(clip_folder, SAMPLE, LABELS, engine="onnx"), "There is no .*model.onnx"),
            (lambda: clipmini.search(clipmini.load(exported), SAMPLE, "a", engine="onnx"), "is loaded already"),
            (lambda: clipmini.evaluate(exported, SAMPLE, engine="gpu"), "engine='gpu' is not allowed"),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    def test_without_onnxruntime(self, exported, monkeypatch):
        monkeypatch.setitem(sys.modules, "onnxruntime", None)
        for call in (
            lambda: clipmini.load(exported, engine="onnx"),
            lambda: clipmini.open_index("index", exported, engine="onnx-int8"),
        ):
            with pytest.raises(ValueError, match=r"needs onnxruntime, .*pip install 'clipmini\[onnx\]'"):
                call()


@pytest.mark.parametrize("engine", ["onnx", "onnx-int8"])
def test_the_commands(exported, photo, tmp_path, engine):
    index = tmp_path / "index"
    for arguments in (
        ["classify", exported, photo, "--labels", "a dog,a boat"],
        ["index", exported, SAMPLE, "--out", index],
        ["search", index, "a dog"],
        ["search", exported, SAMPLE, "a dog"],
        ["evaluate", exported, SAMPLE, "--out", tmp_path / "report"],
    ):
        result = CliRunner().invoke(app, [*map(str, arguments), "--engine", engine, "--json"])
        assert result.exit_code == 0, result.stderr
        assert json.loads(result.stdout)
