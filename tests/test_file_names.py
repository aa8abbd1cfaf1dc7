"""Names of files and folders that are not UTF-8, as old archives unpack to: they work, or a sentence says why not."""

import os
import shutil
import sys
from importlib.util import find_spec

import pytest
from PIL import Image
from typer.testing import CliRunner

import clipmini
from clipmini import cli

LATIN = os.fsdecode(b"caf\xe9")

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="file names are text")


@pytest.fixture
def images(tmp_path):
    """A folder with captions; its name, and that of one of its twelve images, are in Latin-1."""
    folder = tmp_path / LATIN
    folder.mkdir()
    for index in range(11):
        Image.new("RGB", (40, 40), (20 * index, 90, 200)).save(folder / f"{index}.png")
    Image.new("RGB", (40, 40), "red").save(folder / f"{LATIN}.png")
    rows = [b"file_name,caption", *(b"%d.png,number %d" % (index, index) for index in range(11)), b"caf\xe9.png,red"]
    (folder / "metadata.csv").write_bytes(b"\n".join(rows))
    return folder


@pytest.fixture
def named_in_utf8(images, tmp_path):
    return images.rename(tmp_path / "images")


def refused(*arguments):
    """Run the command, and return the one sentence that it ends with."""
    done = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="clipmini")
    assert done.exit_code == 2
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "rename" in sentence
    assert r"caf\udce9" in sentence
    return sentence


def test_search_shows_images_in_a_folder_of_such_a_name(tiny_folder, images):
    hits = clipmini.search(tiny_folder, images, "a", top=12)
    assert {hit.image.name for hit in hits} == {f"{LATIN}.png", *(f"{index}.png" for index in range(11))}


def test_classify(tiny_folder, images):
    (answer,) = (clipmini.classify(tiny_folder, images / f"{LATIN}.png", ["a", "b"]),)
    assert answer[0].label in ("a", "b")


def test_a_plan_uses_images_of_such_names(named_in_utf8, tmp_path):
    arguments = ["train", "demo", "--dry-run", "--source", named_in_utf8, "--output_dir", tmp_path / "run"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="clipmini")
    assert done.exit_code == 0, done.stderr
    assert "used: 12 of 12 rows" in done.stderr


def test_a_recipe(images, named_in_utf8, tmp_path):
    images = shutil.copytree(named_in_utf8, images)
    for option in (["--source", images], ["--output_dir", tmp_path / f"run-{LATIN}"], ["--license", LATIN]):
        refused("train", "demo", *option)
    assert not list(tmp_path.glob("run*"))


def test_a_model(tiny_folder, named_in_utf8, tmp_path):
    model = shutil.copytree(tiny_folder, tmp_path / f"model-{LATIN}")
    refused("search", model, named_in_utf8, "a")
    refused("export", tiny_folder, "--to", "onnx", "--out", tmp_path / f"graphs-{LATIN}")


def test_data_to_evaluate(tiny_folder, images, tmp_path):
    refused("evaluate", tiny_folder, images)
    for name in ("a", "b"):
        shutil.copytree(images, tmp_path / "classes" / name, ignore=shutil.ignore_patterns("*.csv"))
    refused("evaluate", tiny_folder, tmp_path / "classes", "--task", "zero-shot")


def test_embeddings_of_a_teacher(tiny_folder, named_in_utf8, tmp_path):
    refused("teach", tiny_folder, "demo", "--set", f"source={named_in_utf8}", "--out", tmp_path / f"{LATIN}.parquet")


@pytest.mark.skipif(find_spec("lancedb") is None, reason="needs the search extra")
def test_an_index(tiny_folder, images, tmp_path):
    refused("index", tiny_folder, images, "--out", tmp_path / "index")
    images = images.rename(tmp_path / "images")
    refused("index", tiny_folder, images, "--out", tmp_path / f"index-{LATIN}")
