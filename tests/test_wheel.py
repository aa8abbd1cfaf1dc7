"""The built wheel, used outside the checkout."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
PACKAGES = {  # where each package is in a checkout, and in the wheel
    "modeling_clipmini": "modeling_clipmini",
    "clipmini": "clipmini",
    "training": "clipmini/training",
    "configuration": "clipmini/configuration",
    "examples/photos": "clipmini/photos",
}
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The wheel's files, laid out as an installation has them."""
    folder = tmp_path_factory.mktemp("wheel")
    # Of a copy: what an earlier build left in the checkout's build/ would come along.
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "model_card.md"):
        shutil.copy(ROOT / name, folder / name)
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(folder)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(folder / "site")
    return folder / "site"


def run(site, folder, *arguments):
    """Run Python elsewhere, the wheel's files before any other installation of clipmini."""
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True).stdout


def test_it_holds_all_that_is_needed_and_no_more(site):
    names = {str(path.relative_to(site)) for path in site.rglob("*") if path.is_file()}
    shipped = {name for name in names if ".dist-info/" not in name}
    expected = {
        f"{name}/{path.relative_to(ROOT / package).as_posix()}"
        for package, name in PACKAGES.items()
        for path in (ROOT / package).rglob("*")
        if path.suffix in (".py", ".yaml", ".html", ".js", ".typed", ".webp", ".jsonl") or path.name == "README.md"
    }
    assert shipped == {*expected, "clipmini/publishing/model_card.md"}


def test_help_and_a_tiny_training_work_from_it(site, tmp_path):
    where = run(
        site,
        tmp_path,
        "-c",
        "import clipmini.training.run as t, modeling_clipmini as m; print(t.__file__, m.__file__)",
    )
    assert where.count(str(site)) == 2
    assert "Train your own" in run(site, tmp_path, "-m", "clipmini.cli", "--help")
    images = tmp_path / "images"
    images.mkdir()
    lines = ["file_name,caption"]
    for index in range(12):
        Image.new("RGB", (40, 40), (20 * index, 90, 200)).save(images / f"{index}.png")
        lines.append(f"{index}.png,image {index}")
    (images / "metadata.csv").write_text("\n".join(lines))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: tiny\ndata:\n  source: images\ntraining:\n  num_train_epochs: 1\n")
    output = run(site, tmp_path, "-m", "clipmini.cli", "train", recipe, "--json")
    assert json.loads(output)["splits"]["test"]["num_images"] >= 1
    assert (tmp_path / "runs" / "recipe" / "model" / "README.md").exists()


def test_the_demo_and_the_search_that_it_prints_work_in_any_folder(site, tmp_path):
    """Without the towers of PyPI: on the tiny model."""
    options = ["--model", "tiny", "--num_train_epochs", "1"]
    *_, command = run(site, tmp_path, "-m", "clipmini.cli", "train", "demo", *options).splitlines()
    _, *words = shlex.split(command)
    assert words[:3] == ["search", "runs/demo/model", "offline:photos/test"]
    hits = json.loads(run(site, tmp_path, "-m", "clipmini.cli", *words, "--json"))["hits"]
    assert Path(hits[0]["path"]).is_relative_to(site / "clipmini" / "photos" / "test")
