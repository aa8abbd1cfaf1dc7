"""The page of a model as a static Space: its files, and what is refused."""

import hashlib
import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from clipmini import cli
from clipmini.files import weights_sha256
from clipmini.publishing.push import PreparedPush, prepare_push, push
from clipmini.publishing.space import prepare_space
from hub_repositories import Commit, File, Repository
from hub_schema import metadata_of

PAGE = ["README.md", "clipmini.js", "index.html"]
DATA = ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]


def add_graph(folder, name):
    """Write what stands for an exported graph: the page takes it as it is."""
    (folder / "onnx").mkdir(exist_ok=True)
    (folder / "onnx" / name).write_bytes(b"\0graph")
    digest = hashlib.sha256(b"\0graph").hexdigest()
    graphs = [{"file": file.name, "sha256": digest} for file in (folder / "onnx").glob("*.onnx")]
    report = {"weights_sha256": weights_sha256(folder), "graphs": graphs}
    (folder / "onnx" / "export.json").write_text(json.dumps(report))


@pytest.fixture
def folder(pushable_folder):
    """A model that has been exported."""
    for name in ("vision_model.onnx", "text_model.onnx"):
        add_graph(pushable_folder, name)
    return pushable_folder


@pytest.fixture
def run(folder):
    def invoke(*options):
        arguments = ["push", str(folder), "org/clipmini", "--space", *options]
        return CliRunner().invoke(cli.app, arguments, prog_name="clipmini")

    return invoke


def settings_of(page):
    return json.loads(re.search(r'id="settings">(.*?)</script>', page)[1])


def test_a_dry_run_lists_the_files_of_both_without_the_network(run, hub, folder):
    answer = json.loads(run("--dry-run", "--json").stdout)
    sizes = {file["path"]: file["size"] for file in answer["space"]["files"]}
    assert sorted(sizes) == sorted([*PAGE, *DATA, "onnx/text_model.onnx", "onnx/vision_model.onnx"])
    assert sizes["onnx/text_model.onnx"] == (folder / "onnx" / "text_model.onnx").stat().st_size
    assert "model.safetensors" in [file["path"] for file in answer["files"]]
    assert "file of the Space" in run("--dry-run").stdout
    assert hub.requests == []


def test_the_page_goes_up_in_one_commit_after_the_model(run, hub, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "cat.png")
    options = ["--private", "--example", f"{tmp_path / 'cat.png'}=a cat,a <b>dog</b>"]
    told = run(*options).stdout
    assert f"Its page is at: {hub.url}/spaces/org/clipmini" in told
    space = hub.spaces["org/clipmini"]
    assert (space.is_private, space.titles()) == (True, ["Upload space with clipmini", "initial commit"])
    files = space.at("main").files
    metadata = metadata_of(files["README.md"].content.decode())
    assert (metadata["sdk"], metadata["models"], metadata["license"]) == ("static", ["org/clipmini"], "apache-2.0")
    page = files["index.html"].content.decode()
    assert "<title>clipmini in your browser</title>" in page
    assert "<b>dog" not in page
    settings = settings_of(page)
    assert settings["examples"] == [
        {"src": "examples/cat.png", "candidate_labels": "a cat, a <b>dog</b>", "example_title": "cat"}
    ]
    assert {graph["path"] for graph in settings["graphs"].values()} < set(files)
    assert set(settings) == {"model", "url", "license", "logit_scale", "template", "graphs", "examples"}
    again = json.loads(run(*options, "--json").stdout)
    assert (again["is_new"], again["space"]["is_new"]) == (False, False)


def test_quantized_graphs_are_preferred_and_take_the_others_place(run, hub, folder):
    run()
    add_graph(folder, "text_model_quantized.onnx")
    run()
    files = hub.spaces["org/clipmini"].at("main").files
    graphs = {path for path in files if path.startswith("onnx/")}
    assert graphs == {"onnx/text_model_quantized.onnx", "onnx/vision_model.onnx"}
    settings = settings_of(files["index.html"].content.decode())
    assert settings["graphs"]["text"]["path"] == "onnx/text_model_quantized.onnx"


def test_the_logit_scale_is_the_models(folder, tiny_model):
    files = prepare_space(prepare_push(folder, "org/clipmini"), folder).files
    settings = settings_of(files["index.html"].decode())
    assert settings["logit_scale"] == pytest.approx(tiny_model.get_logit_scale().item())


@pytest.mark.parametrize(
    ("options", "change", "words"),
    [
        ([], lambda folder: (folder / "onnx" / "text_model.onnx").unlink(), "--to onnx` makes it"),
        ([], lambda folder: (folder / "preprocessor_config.json").unlink(), "has no preprocessor_config.json"),
        (
            [],
            lambda folder: edit(folder / "preprocessor_config.json", resample=0),
            "has resample=0, and the page",
        ),
        (["--revision", "v2"], lambda folder: None, "A Space shows its branch main"),
    ],
)
def test_refusals_are_one_sentence_and_nothing_is_pushed(run, hub, folder, options, change, words):
    change(folder)
    result = run(*options)
    assert (result.exit_code, result.stdout) == (2, "")
    assert words in result.stderr.splitlines()[-1]
    assert (hub.models, hub.spaces) == ({}, {})


def edit(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_a_space_of_the_users_own_is_left_alone(run, hub):
    space = hub.spaces["org/clipmini"] = Repository("org/clipmini")
    space.add_commit("main", Commit("Mine", {"index.html": File(b"my page", is_lfs=False)}))
    result = run()
    assert "spaces/org/clipmini exists and is no page of clipmini" in result.stderr
    assert space.titles() == ["Mine"]


def test_an_upload_that_breaks_leaves_the_space_as_it_was(folder, hub):
    page = PreparedPush("org/clipmini", {"README.md": b"---\nsdk: static\n---\n", "a.bin": b"\0"}, repo_type="space")
    hub.fail("POST .*/commit/", status=500, times=9)
    with pytest.raises(ValueError, match=r"^spaces/org/clipmini: the Hub has a problem"):
        push(page)
    assert hub.spaces["org/clipmini"].titles() == ["initial commit"]
