"""transformers' zero-shot pipeline on a saved folder, in every way that it is called."""

import pytest
import torch
from PIL import Image
from transformers import pipeline

from modeling_clipmini import ClipMiniModel, ClipMiniProcessor

LABELS = ["a red square", "a blue disc", "nothing"]


@pytest.fixture(scope="module")
def classify(tiny_folder):
    return pipeline("zero-shot-image-classification", model=str(tiny_folder))


@pytest.fixture(scope="module")
def expect(tiny_folder):
    """The same scores from the model itself, without the pipeline."""
    model, processor = (
        ClipMiniModel.from_pretrained(tiny_folder).eval(),
        ClipMiniProcessor.from_pretrained(tiny_folder),
    )

    def score(image, labels=LABELS, template="This is a photo of {}."):
        with torch.no_grad():
            inputs = processor(images=[image], text=[template.format(label) for label in labels], truncation=False)
            scores = model(**inputs).logits_per_image.softmax(dim=-1)[0].tolist()
        return sorted(zip(labels, scores, strict=True), key=lambda item: -item[1])

    return score


@pytest.fixture
def images():
    ramp = Image.linear_gradient("L")
    return [
        Image.merge("RGB", [ramp.rotate(90 * turn).resize(size) for turn in range(3)])
        for size in ((200, 120), (80, 80), (64, 160))
    ]


def assert_same(answer, expected):
    assert [item["label"] for item in answer] == [label for label, _ in expected]
    assert [item["score"] for item in answer] == pytest.approx([score for _, score in expected], abs=1e-5)


def test_pillow_image_and_path(classify, expect, images, tmp_path):
    file = tmp_path / "image.png"
    images[0].save(file)
    for image in (images[0], str(file)):
        assert_same(classify(image, candidate_labels=LABELS), expect(images[0]))


@pytest.mark.parametrize("batch_size", [None, 2, 3])
def test_several_images(classify, expect, images, batch_size):
    answers = classify(images, candidate_labels=LABELS, batch_size=batch_size)
    for image, answer in zip(images, answers, strict=True):
        assert_same(answer, expect(image))


@pytest.mark.parametrize("template", ["{}", "a photo of a {}.", "{} in a drawing"])
def test_templates(classify, expect, images, template):
    answer = classify(images[0], candidate_labels=LABELS, hypothesis_template=template)
    assert_same(answer, expect(images[0], template=template))


def test_one_label(classify, images):
    assert classify(images[0], candidate_labels=["a"]) == [{"label": "a", "score": 1.0}]


def test_long_labels(classify, expect, images):
    """The pipeline pads but does not cut; the model does."""
    labels = ["short", "a label of very many words " * 200, "another one of very many words " * 300]
    assert_same(classify(images[0], candidate_labels=labels), expect(images[0], labels))
    cut = classify(images[0], candidate_labels=labels, tokenizer_kwargs={"truncation": True})
    assert_same(cut, expect(images[0], labels))  # the tokenizer cuts them likewise


def test_many_labels(classify, expect, images):
    labels = [f"thing number {number}" for number in range(500)]
    assert_same(classify(images[0], candidate_labels=labels), expect(images[0], labels))
