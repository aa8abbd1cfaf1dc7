"""Zero-shot scores: exact small cases, and equal to transformers' pipeline."""

import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import pipeline

from clipmini.data.images import Skipped
from clipmini.inference import zero_shot
from clipmini.inference.zero_shot import (
    LabelScore,
    classify,
    classify_files,
    embed_labels,
    fill_template,
    load_templates,
)
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.images_clipmini import ImageError

LABELS = ["cat", "a very long label", "dog", "fish"]


@pytest.fixture
def paths(tmp_path):
    files = []
    for index, color in enumerate(("red", "green", "blue")):
        files.append(tmp_path / f"{color}.png")
        Image.new("RGB", (40 + 30 * index, 60), color).save(files[-1])
    return files


def test_exact_scores(monkeypatch):
    # Cosines 0.6 and 0.8 at a scale of 10 differ by 2: the odds are e^2.
    monkeypatch.setattr(zero_shot, "encode_images", lambda *_: torch.tensor([[0.6, 0.8], [1.0, 0.0]]))
    monkeypatch.setattr(zero_shot, "encode_texts", lambda *_: torch.eye(2))
    model = SimpleNamespace(get_logit_scale=lambda: torch.tensor(10.0), logit_bias=None)
    rows = classify(model, None, ["x", "y"], ["cat", "dog"])
    odds = math.exp(2.0)
    assert [[item.label for item in row] for row in rows] == [["dog", "cat"], ["cat", "dog"]]
    assert rows[0][0].score == pytest.approx(odds / (1 + odds), abs=1e-6)
    assert rows[0][1].score == pytest.approx(1 / (1 + odds), abs=1e-6)
    assert rows[1][0].score == pytest.approx(1 / (1 + math.exp(-10.0)), abs=1e-6)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("template", ["a photo of a {}.", "{}"])
def test_equals_the_pipeline(tiny_config, tiny_processor, paths, loss, template):
    torch.manual_seed(1)
    model = ClipMiniModel(tiny_config(loss=loss)).eval()
    judge = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=tiny_processor.tokenizer,
        image_processor=tiny_processor.image_processor,
    )
    expected = judge([str(path) for path in paths], candidate_labels=LABELS, hypothesis_template=template)
    rows = classify(model, tiny_processor, paths, LABELS, template, batch_size=2)
    assert len(rows) == len(paths)
    for row, wanted in zip(rows, expected, strict=True):
        assert [item.label for item in row] == [item["label"] for item in wanted]
        assert [item.score for item in row] == pytest.approx([item["score"] for item in wanted], abs=1e-5)
        assert sum(item.score for item in row) == pytest.approx(1.0, abs=1e-5)


def test_one_label_is_certain(tiny_model, tiny_processor, paths):
    assert classify(tiny_model, tiny_processor, paths[:1], ["cat"]) == [[LabelScore("cat", 1.0)]]


def test_no_gradients_are_computed(tiny_model, tiny_processor, paths):
    classify(tiny_model, tiny_processor, paths, LABELS)
    assert all(parameter.grad is None for parameter in tiny_model.parameters())


def test_an_unreadable_image_is_an_error(tiny_model, tiny_processor, tmp_path):
    with pytest.raises(ImageError, match=r"none\.png: does not exist"):
        classify(tiny_model, tiny_processor, [tmp_path / "none.png"], LABELS)


def test_unreadable_files_are_left_out_and_listed(tiny_model, tiny_processor, paths):
    bad = paths[0].with_name("bad.png")
    bad.write_bytes(b"")
    skipped = Skipped()
    results = classify_files(tiny_model, tiny_processor, [paths[0], bad, paths[2]], LABELS, skipped=skipped)
    assert [path for path, _ in results] == [paths[0], paths[2]]
    assert [name for name, _ in skipped.items] == [str(bad)]
    expected = classify(tiny_model, tiny_processor, [paths[0], paths[2]], LABELS)
    for (_, row), wanted in zip(results, expected, strict=True):
        assert [item.score for item in row] == pytest.approx([item.score for item in wanted], abs=1e-6)


def test_strict_raises(tiny_model, tiny_processor, paths, tmp_path):
    with pytest.raises(ValueError, match=r"none\.png: does not exist"):
        classify_files(
            tiny_model, tiny_processor, [*paths, tmp_path / "none.png"], LABELS, skipped=Skipped(strict=True)
        )


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        ([], "a {}", "at least one"),
        ("cat", "a {}", "a list"),
        (["cat", " "], "a {}", "Label 2 of 2 is blank"),
        (["cat", "dog", "cat"], "a {}", "'cat' is given twice"),
        (["cat"], "a photo", "no {} where"),
        (["cat"], "a {0}", "no {} where"),
        (["cat", "a \udcff fish"], "a {}", r"label 'a \\udcff fish' is not text in UTF-8"),
        (["cat"], "\udcff {}", r"template '\\udcff \{\}' is not text in UTF-8"),
    ],
)
def test_bad_labels_and_templates(tiny_model, tiny_processor, paths, labels, template, message):
    with pytest.raises(ValueError, match=message):
        classify(tiny_model, tiny_processor, paths, labels, template)
    with pytest.raises(ValueError, match=message):
        classify_files(tiny_model, tiny_processor, paths, labels, template)


def test_other_braces_stay():
    assert fill_template(["c{a}t", "d{}g"], "{x} {}!") == ["{x} c{a}t!", "{x} d{}g!"]


def test_damaged_weights(tiny_model, tiny_processor, paths):
    tiny_model.logit_scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="are NaN"):
        classify(tiny_model, tiny_processor, paths, LABELS)


def test_a_label_is_the_mean_direction_of_its_captions():
    vectors = {"a x": [1.0, 0.0], "a y": [0.0, 1.0], "the x": [0.6, 0.8], "the y": [0.0, 1.0]}
    embeds = embed_labels(
        lambda captions: torch.tensor([vectors[text] for text in captions]), ["x", "y"], ["a {}", "the {}"]
    )
    torch.testing.assert_close(embeds, torch.tensor([[0.8, 0.4], [0.0, 1.0]]) / torch.tensor([[0.8**0.5], [1.0]]))


def test_a_list_of_one_template_equals_the_template(tiny_model, tiny_processor, paths):
    one = classify(tiny_model, tiny_processor, paths, LABELS, "a {}")
    assert classify(tiny_model, tiny_processor, paths, LABELS, ["a {}"]) == one
    assert classify(tiny_model, tiny_processor, paths, LABELS, ["a {}", "two {}"]) != one


def test_templates_that_come_with_clipmini():
    assert load_templates("a {} b") == ["a {} b"]
    assert len(load_templates("imagenet")) == len(set(load_templates("imagenet"))) == 80
    assert "itap of my {}." in load_templates("imagenet")
    assert "{}" in load_templates("simple")


def test_templates_of_a_file(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("- an x-ray of a {}\n- a scan of a {}\n")
    assert load_templates(str(file)) == ["an x-ray of a {}", "a scan of a {}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("- a photo\n", "has no {}"),
        ("a: {}\n", "is not a list of templates"),
        ("[]\n", "is not a list of templates"),
        ("[1]\n", "is not a list of templates"),
        ("- [\n", "is not YAML"),
    ],
)
def test_bad_template_files(tmp_path, content, message):
    file = tmp_path / "bad.yaml"
    file.write_text(content)
    with pytest.raises(ValueError, match=message):
        load_templates(str(file))


def test_unknown_lists_of_templates():
    with pytest.raises(ValueError, match=r"'imagnet' is not a template; .* one of imagenet, simple"):
        load_templates("imagnet")
    with pytest.raises(ValueError, match="There is no template; give at least one"):
        embed_labels(torch.tensor, ["x"], [])
