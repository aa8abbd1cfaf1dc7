"""Images that tests of search and drawing share."""

import pytest
from PIL import Image

COLORS = ["red", "green", "blue", "white", "black"]


@pytest.fixture
def folder(tmp_path):
    """Five plain images of different shapes, one of them in a subfolder."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for index, color in enumerate(COLORS):
        parent = root / "more" if color == "white" else root
        Image.new("RGB", (30 + 20 * index, 60), color).save(parent / f"{color}.png")
    return root
