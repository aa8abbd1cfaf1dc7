"""The saved folder as strangers use it: where neither `clipmini` nor `modeling_clipmini` can be imported."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from stranger import run_as_stranger as run

PROLOGUE = """
import torch
from PIL import Image
from transformers import AutoConfig, AutoModel, AutoModelForZeroShotImageClassification, AutoProcessor, pipeline
folder, image = sys.argv[1:3]
LABELS = ["red", "blue", "a label of very many words " * 200]
"""


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    file = tmp_path_factory.mktemp("image") / "image.png"
    Image.linear_gradient("L").resize((200, 120)).convert("RGB").save(file)
    return file


def run_as_stranger(code, tmp_path, *arguments, check=True):
    return run(PROLOGUE + code, tmp_path, *arguments, check=check)


def test_model_processor_and_pipeline_load_and_agree(tiny_folder, image, tmp_path):
    model, processor = ClipMiniModel.from_pretrained(tiny_folder), ClipMiniProcessor.from_pretrained(tiny_folder)
    labels = ["red", "blue", "a label of very many words " * 200]
    with torch.no_grad():
        expected = model(**processor(images=[Image.open(image)], text=labels)).logits_per_image
        uncut = model(**processor(images=[Image.open(image)], text=labels, truncation=False)).logits_per_image
    code = """
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    logits = model(**processor(images=[Image.open(image)], text=LABELS)).logits_per_image
classify = pipeline("zero-shot-image-classification", model=folder, trust_remote_code=True)
scores = classify(image, candidate_labels=LABELS, hypothesis_template="{}")  # does not cut the long label
print(json.dumps({"logits": logits.tolist(), "scores": {s["label"]: s["score"] for s in scores}}))
"""
    output = json.loads(run_as_stranger(code, tmp_path, tiny_folder, image).stdout.splitlines()[-1])
    assert torch.allclose(torch.tensor(output["logits"]), expected, atol=1e-5)
    probabilities = uncut.softmax(dim=-1)[0].tolist()
    assert [output["scores"][label] for label in labels] == pytest.approx(probabilities, abs=1e-5)


def test_one_line_embeds(tiny_folder, image, tmp_path):
    model = ClipMiniModel.from_pretrained(tiny_folder)
    code = """
embeds = AutoModel.from_pretrained(folder, trust_remote_code=True).encode_text(LABELS)
both = [embeds, AutoModel.from_pretrained(folder, trust_remote_code=True).encode_image(image)]
print(json.dumps([embeds.tolist() for embeds in both]))
"""
    texts, images = json.loads(run_as_stranger(code, tmp_path, tiny_folder, image).stdout.splitlines()[-1])
    labels = ["red", "blue", "a label of very many words " * 200]
    assert np.allclose(texts, model.encode_text(labels), atol=1e-6)
    assert np.allclose(images, model.encode_image(image), atol=1e-6)


def test_a_stranger_who_saves_it_again_has_all_of_it(tiny_folder, image, tmp_path):
    code = """
model = AutoModelForZeroShotImageClassification.from_pretrained(folder, trust_remote_code=True)
AutoProcessor.from_pretrained(folder, trust_remote_code=True).save_pretrained("again")
model.save_pretrained("again")
again = AutoModel.from_pretrained("again", trust_remote_code=True)
pixels = torch.ones(1, 3, 160, 160)
print(torch.equal(model(pixel_values=pixels).image_embeds, again(pixel_values=pixels).image_embeds))
pipeline("zero-shot-image-classification", model="again", trust_remote_code=True)(image, candidate_labels=["a", "b"])
print(json.dumps(AutoConfig.from_pretrained("again", trust_remote_code=True).auto_map))
"""
    lines = run_as_stranger(code, tmp_path, tiny_folder, image).stdout.splitlines()
    assert lines[-2] == "True"
    assert json.loads(lines[-1]) == {
        "AutoConfig": "configuration_clipmini.ClipMiniConfig",
        "AutoModel": "modeling_clipmini.ClipMiniModel",
        "AutoModelForZeroShotImageClassification": "modeling_clipmini.ClipMiniModel",
        "AutoProcessor": "processing_clipmini.ClipMiniProcessor",
    }
    assert {file.name for file in tiny_folder.iterdir()} == {file.name for file in (tmp_path / "again").iterdir()}


def test_without_trust_it_is_refused(tiny_folder, image, tmp_path):
    code = """
for loader in (AutoModel, AutoProcessor, AutoConfig):
    try:
        loader.from_pretrained(folder)
    except ValueError as error:
        print("REFUSED" if "trust_remote_code" in str(error) else error)
"""
    # It asks first whether to trust, and has no one to answer.
    assert run_as_stranger(code, tmp_path, tiny_folder, image).stdout.count("REFUSED") == 3


def test_the_folder_is_complete(tiny_folder):
    assert {file.name for file in tiny_folder.iterdir()} == {
        "config.json",
        "configuration_clipmini.py",
        "encoding_clipmini.py",
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
