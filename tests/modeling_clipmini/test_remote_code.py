"""The saved folder as strangers use it: where neither `clipmini` nor `modeling_clipmini` can be imported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from stranger import run_as_stranger

LABELS = ["red", "blue", "a label of very many words " * 200]
USE = r"""
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
folder, image, labels = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
found = {"refused": []}
for loader in (AutoModel, AutoProcessor, AutoConfig):
    try:
        loader.from_pretrained(folder)
    except ValueError as error:
        found["refused"].append(str(error))

model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    found["logits"] = model(**processor(images=[Image.open(image)], text=labels)).logits_per_image.tolist()
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
scores = classify(image, candidate_labels=labels, hypothesis_template="{}")  # does not cut the long label
found["scores"] = {score["label"]: score["score"] for score in scores}
found["texts"] = AutoModel.from_pretrained(folder, trust_remote_code=True).encode_text(labels).tolist()
found["images"] = AutoModel.from_pretrained(folder, trust_remote_code=True).encode_image(image).tolist()

model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained("again")
model.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
pixels = torch.ones(1, 3, 160, 160)
found["is_same"] = torch.equal(model(pixel_values=pixels).image_embeds, again(pixel_values=pixels).image_embeds)
pipeline("zero-shot-image-classification", model="again", trust_remote_code=True)(image, candidate_labels=["a", "b"])
found["auto_map"] = AutoConfig.from_pretrained("again", trust_remote_code=True).auto_map
print("", json.dumps(found), sep="\n")  # the question whether to trust ends no line
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The stranger's folder, with an image in it."""
    folder = tmp_path_factory.mktemp("stranger")
    Image.linear_gradient("L").resize((200, 120)).convert("RGB").save(folder / "image.png")
    return folder


@pytest.fixture(scope="module")
def found(tiny_folder, folder):
    output = run_as_stranger(USE, folder, tiny_folder, folder / "image.png", json.dumps(LABELS)).stdout
    return json.loads(output.splitlines()[-1])


def test_without_trust_it_is_refused(found):
    # It asks first whether to trust, and has no one to answer.
    assert ["trust_remote_code" in message for message in found["refused"]] == [True] * 3


def test_model_processor_and_pipeline_load_and_agree(tiny_folder, folder, found):
    model, processor = ClipMiniModel.from_pretrained(tiny_folder), ClipMiniProcessor.from_pretrained(tiny_folder)
    image = Image.open(folder / "image.png")
    with torch.no_grad():
        expected = model(**processor(images=[image], text=LABELS)).logits_per_image
        uncut = model(**processor(images=[image], text=LABELS, truncation=False)).logits_per_image
    assert torch.allclose(torch.tensor(found["logits"]), expected, atol=1e-5)
    probabilities = uncut.softmax(dim=-1)[0].tolist()
    assert [found["scores"][label] for label in LABELS] == pytest.approx(probabilities, abs=1e-5)


def test_one_line_embeds(tiny_folder, folder, found):
    model = ClipMiniModel.from_pretrained(tiny_folder)
    assert np.allclose(found["texts"], model.encode_text(LABELS), atol=1e-6)
    assert np.allclose(found["images"], model.encode_image(folder / "image.png"), atol=1e-6)


def test_a_stranger_who_saves_it_again_has_all_of_it(tiny_folder, folder, found):
    assert found["is_same"]
    assert found["auto_map"] == {
        "AutoConfig": "configuration_clipmini.ClipMiniConfig",
        "AutoModel": "modeling_clipmini.ClipMiniModel",
        "AutoModelForZeroShotImageClassification": "modeling_clipmini.ClipMiniModel",
        "AutoProcessor": "processing_clipmini.ClipMiniProcessor",
    }
    assert {file.name for file in tiny_folder.iterdir()} == {file.name for file in (folder / "again").iterdir()}


def test_the_folder_is_complete(tiny_folder):
    assert {file.name for file in tiny_folder.iterdir()} == {
        "config.json",
        "configuration_clipmini.py",
        "encoding_clipmini.py",
        "folding_clipmini.py",
        "images_clipmini.py",
        "loss_clipmini.py",
        "model.safetensors",
        "modeling_clipmini.py",
        "preprocessor_config.json",
        "processing_clipmini.py",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_both_processor_files_agree(tiny_folder):
    nested = json.loads((tiny_folder / "processor_config.json").read_text())["image_processor"]
    plain = json.loads((tiny_folder / "preprocessor_config.json").read_text())
    differing = {key for key in {*nested, *plain} if nested.get(key) != plain.get(key)}
    assert differing <= {"auto_map", "processor_class"}
