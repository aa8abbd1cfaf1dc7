"""One saved folder under many versions of transformers, the oldest supported and the newest among them.

Each version is installed once, with what it needs besides torch, into a folder of its own; see `downloads.py`.
"""

import json
import re
import shutil
import sys
from importlib.metadata import requires

import numpy as np
import pytest
import torch
from PIL import Image

from downloads import cache_folder, pip
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from stranger import run_as_stranger

pytestmark = pytest.mark.versions

VERSIONS = ("5.8.1", "5.12.1", "5.16.1", "5.20.2", "5.24.0")  # a new one is added at the end
FLOOR, TOO_OLD = "5.8", "5.7.0"
TEXTS = ["a cat", "a somewhat longer caption of a dog", "many words " * 100]

CODE = """
import torch, transformers
from PIL import Image
from transformers import AutoModel, AutoProcessor, pipeline
folder, image, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(**processor(images=[Image.open(image)], text=texts)).logits_per_image
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
scores = {score["label"]: score["score"] for score in classify(image, candidate_labels=["a", "b"])}
model.save_pretrained("again")
processor.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True).encode_text(texts)
print(json.dumps({
    "version": transformers.__version__,
    "logits": logits.tolist(),
    "images": model.encode_image([image]).tolist(),
    "texts": model.encode_text(texts).tolist(),
    "scores": [scores["a"], scores["b"]],
    "again": again.tolist(),
}))
"""


def installed(version):
    """The folder with this version and what it needs, but for torch, timm and torchvision."""
    folder = cache_folder() / f"transformers-{version}-python{sys.version_info.major}.{sys.version_info.minor}"
    if not (folder / "transformers").is_dir():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)  # pip would leave what it finds there as it is
        pip("install", "--quiet", "--target", partial, f"transformers=={version}")
        partial.rename(folder)
    return folder


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "image.png"
    Image.linear_gradient("L").resize((200, 120)).convert("RGB").save(file)
    return file


def run_under(version, tmp_path, monkeypatch, *arguments, check=True):
    monkeypatch.setenv("PYTHONPATH", str(installed(version)))
    return run_as_stranger(CODE, tmp_path, *arguments, json.dumps(TEXTS), check=check)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_saved_folder_gives_the_same(version, tiny_folder, image, tmp_path, monkeypatch):
    model, processor = ClipMiniModel.from_pretrained(tiny_folder), ClipMiniProcessor.from_pretrained(tiny_folder)
    with torch.no_grad():
        expected = model(**processor(images=[Image.open(image)], text=TEXTS)).logits_per_image
    output = json.loads(run_under(version, tmp_path, monkeypatch, tiny_folder, image).stdout.splitlines()[-1])
    assert output["version"] == version
    assert np.allclose(output["logits"], expected, atol=1e-4)
    assert np.allclose(output["images"], model.encode_image([image]), atol=1e-5)
    assert np.allclose(output["texts"], model.encode_text(TEXTS), atol=1e-5)
    assert np.allclose(output["again"], output["texts"], atol=1e-6)
    assert sum(output["scores"]) == pytest.approx(1)


def test_what_is_too_old_says_so(tiny_folder, image, tmp_path, monkeypatch):
    result = run_under(TOO_OLD, tmp_path, monkeypatch, tiny_folder, image, check=False)
    assert f"clipmini models need transformers {FLOOR} or newer, and {TOO_OLD} is installed: pip" in result.stderr


def test_the_stated_floor_is_the_oldest_that_is_tried():
    stated = next(line for line in requires("clipmini") if re.match(r"transformers\b", line))
    assert f"transformers>={FLOOR}" in stated
    assert VERSIONS[0].startswith(FLOOR)
