"""What an export writes, measures and refuses, and what a push makes of it."""

import json
import shutil
import sys

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from PIL import Image
from typer.testing import CliRunner

import clipmini
from clipmini.cli import app
from clipmini.files import RECIPE_FILE, RunRecord, weights_sha256
from clipmini.names import as_command
from clipmini.publishing import export as export_module
from clipmini.publishing.export import _check_recall
from clipmini.publishing.push import prepare_push
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.modeling_clipmini import normalize

FLOAT_GRAPHS = ["vision_model.onnx", "text_model.onnx"]
INT8_GRAPHS = ["vision_model_quantized.onnx", "text_model_quantized.onnx"]


def files_of(exported):
    return [graph["file"] for graph in exported.results["graphs"]]


@pytest.fixture
def pairs(tmp_path):
    """Ten images with a caption each."""
    folder = tmp_path / "pairs"
    folder.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (10, 32, 40, 3), dtype=np.uint8)
    for index, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{index}.png")
    lines = [f"{index}.png,number {index}" for index in range(10)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    return folder


@pytest.fixture
def traced_already(exported_folder, monkeypatch):
    """Take the graphs of the tiny model from an earlier export: tracing takes seconds."""

    def write_graph(model, graph, folder, *_):
        shutil.copy(exported_folder / "onnx" / f"{graph}.onnx", folder)

    monkeypatch.setattr(export_module, "_write_graph", write_graph)
    monkeypatch.setattr(export_module, "NUM_ROUNDS", 1)


@pytest.fixture(scope="session")
def exported_folder(tiny_folder, tmp_path_factory):
    """A tiny model with all four graphs. Read only."""
    folder = tmp_path_factory.mktemp("exported") / "model"
    shutil.copytree(tiny_folder, folder)
    clipmini.export(folder, int8=True, calibration="offline:photos/test")
    return folder


def open_graph(file):
    return onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])


def test_the_graphs_take_and_return_what_other_programs_expect(exported_folder):
    vision, text = (open_graph(exported_folder / "onnx" / name) for name in FLOAT_GRAPHS)
    assert [(item.name, item.type) for item in vision.get_inputs()] == [("pixel_values", "tensor(float)")]
    assert [(item.name, item.type) for item in text.get_inputs()] == [
        ("input_ids", "tensor(int64)"),
        ("attention_mask", "tensor(int64)"),
    ]
    assert [item.name for item in (*vision.get_outputs(), *text.get_outputs())] == ["image_embeds", "text_embeds"]
    model = clipmini.load(exported_folder, "cpu")
    inputs = model.processor(text=["a", "a red bicycle in the rain"])  # padded
    (embeds,) = text.run(None, {name: value.numpy() for name, value in inputs.items()})
    with torch.no_grad():
        wanted = normalize(model.get_text_features(**inputs).pooler_output)
    assert np.allclose(embeds, wanted, atol=1e-5)
    for session in (vision, text):
        facts = session.get_modelmeta().custom_metadata_map
        assert facts["weights_sha256"] == weights_sha256(exported_folder)
        assert float(facts["logit_scale"]) == pytest.approx(model.get_logit_scale().item())


def test_a_caption_as_long_as_the_model_reads(exported_folder):
    text = open_graph(exported_folder / "onnx" / "text_model.onnx")
    ids = np.full((2, 64), 7)
    (embeds,) = text.run(None, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
    assert np.allclose(np.linalg.norm(embeds, axis=1), 1, atol=1e-5)


@pytest.mark.usefixtures("traced_already")
def test_what_an_export_reports(pushable_folder, pairs):
    exported = clipmini.export(pushable_folder, pairs=pairs)
    assert files_of(exported) == sorted(FLOAT_GRAPHS)
    for graph in exported.results["graphs"]:
        assert graph["num_bytes"] == (pushable_folder / "onnx" / graph["file"]).stat().st_size
        assert graph["min_cosine"] == pytest.approx(1, abs=1e-5)
        assert min(graph["torch_ms"], graph["onnx_ms"]) > 0
    assert exported.results["retrieval"] == {}
    assert "could not tell" in exported.tables[1].title
    assert "500 images" in exported.tables[1].note
    assert "pairs has 10" in exported.tables[1].note
    written = json.loads((pushable_folder / "onnx" / "export.json").read_text())
    assert written["source"] == "pairs"  # and not where it is on this machine
    assert str(pairs.parent) not in json.dumps(written)


@pytest.mark.usefixtures("traced_already")
def test_recall_is_told_of_enough_pairs(pushable_folder, pairs, monkeypatch):
    monkeypatch.setattr(export_module, "MIN_IMAGES", 10)
    exported = clipmini.export(pushable_folder, pairs=pairs)
    assert exported.results["retrieval"]["onnx"] == exported.results["retrieval"]["torch"]
    assert exported.results["retrieval"]["torch"].keys() == {"text_to_image_r1", "image_to_text_r1"}
    assert [row[0] for row in exported.tables[1].rows] == ["torch", "onnx"]


def results_with(torch_recall, int8_recall):
    recalls = ((torch_recall, 0.4), (int8_recall, 0.4))
    keys = ("text_to_image_r1", "image_to_text_r1")
    retrieval = {
        name: dict(zip(keys, values, strict=True))
        for name, values in zip(("torch", "onnx-int8"), recalls, strict=True)
    }
    return {"source": "pairs", "retrieval": retrieval}


def test_more_than_a_point_of_recall_lost_is_refused():
    _check_recall(results_with(0.50, 0.495))
    _check_recall(results_with(0.50, 0.60))
    with pytest.raises(ValueError, match=r"onnx-int8 loses 2\.0 points of .* --force"):
        _check_recall(results_with(0.50, 0.48))


@pytest.mark.usefixtures("traced_already")
def test_what_loses_too_much_is_kept_only_by_force(pushable_folder, pairs, monkeypatch):
    monkeypatch.setattr(export_module, "MIN_IMAGES", 10)
    monkeypatch.setattr(export_module, "MAX_LOST", -0.01)
    with pytest.raises(ValueError, match="nothing is kept"):
        clipmini.export(pushable_folder, pairs=pairs)
    assert not (pushable_folder / "onnx").exists()
    clipmini.export(pushable_folder, pairs=pairs, force=True)
    assert (pushable_folder / "onnx" / "text_model.onnx").exists()


@pytest.mark.usefixtures("traced_already")
def test_nothing_is_kept_of_what_fails_and_an_earlier_export_stays(exported_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(exported_folder, folder)
    before = {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export_module, "MAX_DIFFERENCE", -1.0)
        with pytest.raises(ValueError, match=r"vision_model\.onnx differ from torch's by .* is allowed"):
            clipmini.export(folder)
        with pytest.raises(ValueError, match="differ from torch"):
            clipmini.export(folder, tmp_path / "out")
    assert {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()} == before
    assert not (tmp_path / "out").exists()
    clipmini.export(folder)  # without int8: no graph of the earlier one is left
    assert sorted(file.name for file in (folder / "onnx").iterdir()) == sorted([*FLOAT_GRAPHS, "export.json"])


def test_what_cannot_be_exported_is_refused_in_a_sentence(pushable_folder, monkeypatch):
    def forward(self, pixel_values, **_):
        return {"pooler_output": pixel_values.mean() if pixel_values.sum() > 0 else pixel_values}

    monkeypatch.setattr(ClipMiniModel, "get_image_features", forward)
    with pytest.raises(ValueError, match="The image half of model cannot be exported: ") as caught:
        clipmini.export(pushable_folder)
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)
    assert not (pushable_folder / "onnx").exists()


def test_int8_is_smaller_and_nearly_the_same(exported_folder):
    graphs = exported_folder / "onnx"
    for name, small in zip(FLOAT_GRAPHS, INT8_GRAPHS, strict=True):
        assert (graphs / small).stat().st_size < (graphs / name).stat().st_size
        weights = onnx.load(graphs / small).graph.initializer
        assert any(numpy_helper.to_array(weight).dtype == np.int8 for weight in weights)
    report = {graph["file"]: graph for graph in json.loads((graphs / "export.json").read_text())["graphs"]}
    assert list(report) == sorted([*FLOAT_GRAPHS, *INT8_GRAPHS])
    assert min(graph["mean_cosine"] for graph in report.values()) > 0.95


@pytest.mark.usefixtures("traced_already")
def test_without_images_to_calibrate_with_the_image_half_stays_in_float32(pushable_folder, caplog):
    exported = clipmini.export(pushable_folder, int8=True)
    assert files_of(exported) == sorted([*FLOAT_GRAPHS, "text_model_quantized.onnx"])
    assert "The image half stays in float32" in caplog.text


@pytest.mark.usefixtures("traced_already")
class TestOwnFolder:
    def test_it_has_what_loading_needs_and_no_weights(self, tiny_folder, tmp_path):
        exported = clipmini.export(tiny_folder, tmp_path / "out")
        assert exported.folder == tmp_path / "out" / "onnx"
        names = {file.name for file in (tmp_path / "out").iterdir()}
        assert {"config.json", "preprocessor_config.json", "tokenizer.json", "onnx"} <= names
        assert not any(name.endswith((".safetensors", ".py")) for name in names)
        wanted = clipmini.load(tiny_folder, "cpu").encode_text("a red bicycle")
        assert clipmini.load(tmp_path / "out", engine="onnx").encode_text("a red bicycle") == pytest.approx(
            wanted, abs=1e-5
        )
        clipmini.export(tiny_folder, tmp_path / "out")  # replaces it

    def test_a_folder_with_other_files_is_refused(self, tiny_folder, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "thesis.tex").write_text("years of work")
        with pytest.raises(ValueError, match=r"holds thesis\.tex, which no export wrote"):
            clipmini.export(tiny_folder, tmp_path / "out")
        (tmp_path / "out" / "thesis.tex").rename(tmp_path / "file")
        with pytest.raises(ValueError, match="is a file"):
            clipmini.export(tiny_folder, tmp_path / "file")

    def test_the_models_own_graphs_are_not_replaced_by_a_folder(self, exported_folder):
        with pytest.raises(ValueError, match=r"is where the graphs of .* go without --out; leave it out"):
            clipmini.export(exported_folder, exported_folder / "onnx")

    def test_a_model_folder_is_refused(self, exported_folder, tmp_path):
        shutil.copytree(exported_folder, tmp_path / "model")
        with pytest.raises(ValueError, match="which no export wrote"):
            clipmini.export(tmp_path / "model", tmp_path / "model")


class TestPush:
    def test_the_graphs_go_along_and_the_card_says_so(self, pushable_folder, exported_folder):
        shutil.copytree(exported_folder / "onnx", pushable_folder / "onnx")
        prepared = prepare_push(pushable_folder, "org/clipmini")
        assert {f"onnx/{name}" for name in (*FLOAT_GRAPHS, *INT8_GRAPHS)} <= prepared.files.keys()
        card = prepared.files["README.md"].decode()
        assert card.count('clipmini.load("org/clipmini", engine="onnx")') == 1
        (pushable_folder / "README.md").write_text(card)
        again = prepare_push(pushable_folder, "org/clipmini").files["README.md"].decode()
        assert again.count('clipmini.load("org/clipmini", engine="onnx")') == 1

    def test_graphs_of_other_weights_are_refused(self, pushable_folder, exported_folder):
        shutil.copytree(exported_folder / "onnx", pushable_folder / "onnx")
        model = ClipMiniModel.from_pretrained(pushable_folder)
        model.logit_scale.data += 1
        model.save_pretrained(pushable_folder)
        with pytest.raises(ValueError, match=r"graphs in .* are of other weights .* run `clipmini export` again"):
            prepare_push(pushable_folder, "org/clipmini")

    @pytest.mark.parametrize("change", ["another graph", "one more", "no report", "no list"])
    def test_graphs_that_were_changed_are_refused(self, pushable_folder, exported_folder, change):
        shutil.copytree(exported_folder / "onnx", pushable_folder / "onnx")
        graph, report = (pushable_folder / "onnx" / name for name in ("text_model.onnx", "export.json"))
        if change == "another graph":
            graph.write_bytes(graph.read_bytes() + b" ")
        elif change == "one more":
            graph.with_name("text_model_more.onnx").write_bytes(b"")
        elif change == "no report":
            report.unlink()
        else:
            report.write_text(json.dumps(json.loads(report.read_text()) | {"graphs": None}))
        with pytest.raises(ValueError, match="are of other weights than those beside them"):
            prepare_push(pushable_folder, "org/clipmini")

    @pytest.mark.usefixtures("traced_already")
    def test_a_run_may_replace_the_graphs_of_its_model(self, pushable_folder, monkeypatch):
        run = pushable_folder.parent
        monkeypatch.chdir(run)
        (run / RECIPE_FILE).write_text("data: {source: photos}\n")
        RunRecord(run).add(file for file in pushable_folder.iterdir())
        clipmini.export(pushable_folder.name)
        assert "model/onnx/vision_model.onnx" in RunRecord(run).read()
        record = RunRecord(run)
        assert set(record.find_outputs([])) - record.read() == {"recipe_as_run.yaml"}  # which this test wrote


@pytest.mark.parametrize("package", ["onnxruntime", "onnx", "onnxscript"])
def test_a_missing_package_names_the_extra(tiny_folder, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"An export needs {package}, .*pip install 'clipmini\[onnx\]'"):
        clipmini.export(tiny_folder)


def run(*arguments):
    return CliRunner().invoke(app, list(map(str, arguments)))


@pytest.mark.usefixtures("traced_already")
def test_the_command(pushable_folder, tmp_path):
    result = run("export", pushable_folder, "--to", "onnx", "--json")
    assert result.exit_code == 0, result.stderr
    assert [graph["file"] for graph in json.loads(result.stdout)["graphs"]] == sorted(FLOAT_GRAPHS)
    result = run("export", pushable_folder, "--to", "onnx", "--out", tmp_path / "out")
    assert "could not tell" in result.stdout
    assert f"The graphs are in {tmp_path / 'out' / 'onnx'}" in result.stdout


def test_the_command_refuses_what_it_does_not_know(tiny_folder, tmp_path):
    for options, message in (
        (["--to", "tflite"], "the only format is onnx"),
        (["--to", "onnx", "--calibration", "offline:photos/test"], "add --int8"),
        (["--to", "onnx", "--int8", "--calibration", tmp_path], "has no images"),
        (["--to", "onnx", "--pairs", tmp_path / "none"], "does not exist"),
    ):
        result = run("export", tiny_folder, *options)
        assert result.exit_code == 2, options
        assert message in result.stderr
    assert as_command("export", "my model", options=["--to", "onnx"]) == "clipmini export 'my model' --to onnx"


FAMILIES = {  # small random models of twelve families: convolutional, transformer and hybrid
    "test_byobnet": "RepVGG",
    "test_convnext": "ConvNeXt",
    "test_efficientnet": "EfficientNet",
    "test_mambaout": "MambaOut",
    "test_nfnet": "NFNet",
    "test_resnet": "ResNet",
    "mobilenetv3_small_050": "MobileNetV3",
    "test_vit": "ViT",
    "deit_tiny_patch16_224": "DeiT",
    "swin_tiny_patch4_window7_224": "Swin",
    "mobilevit_xxs": "MobileViT",
    "fastvit_t8": "FastViT",
    "levit_128s": "LeViT",
}


def export_tiny(config, folder):
    """Export a random model, and check that the image graph gives the same vectors."""
    from clipmini.training.build import character_tokenizer

    torch.manual_seed(0)
    ClipMiniModel(config).save_pretrained(folder)
    ClipMiniProcessor.from_towers(config, character_tokenizer()).save_pretrained(folder)
    assert clipmini.export(folder).results["graphs"][1]["min_cosine"] > 0.9999


@pytest.mark.slow
@pytest.mark.parametrize("architecture", FAMILIES)
def test_families_of_timm(architecture, tiny_config, tmp_path):
    export_tiny(tiny_config(vision_config={"architecture": architecture}), tmp_path)


def test_two_vision_towers_are_one_graph(tiny_config, tmp_path):
    export_tiny(tiny_config(side_vision_config={"architecture": "test_convnext"}, vision_levels=[1]), tmp_path)
