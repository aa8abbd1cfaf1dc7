"""What the tests of evaluation share."""

import datasets
import pytest
from PIL import Image, ImageDraw


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path_factory.mktemp("clipmini")))


@pytest.fixture
def class_folder(tmp_path):
    """Ten pictures of each of three classes, a folder for each."""
    for number, (name, color) in enumerate((("red_fox", "red"), ("tree", "green"), ("sea", "blue"))):
        folder = tmp_path / "classes" / name
        folder.mkdir(parents=True)
        for index in range(10):
            image = Image.new("RGB", (40, 32), color)
            ImageDraw.Draw(image).rectangle((index, 2 * number, index + 8, 20), fill="white")
            image.save(folder / f"{index}.png")
    return tmp_path / "classes"
