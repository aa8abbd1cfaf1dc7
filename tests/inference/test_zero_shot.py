"""Zero-shot scores: exact small cases, and equal to transformers' pipeline."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from transformers import pipeline

import clipmini
from clipmini.inference.prompts import fill_template, load_templates
from clipmini.inference.zero_shot import Classification, ClassifiedImage, LabelScore, classify, embed_labels
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.handler import DEFAULT_TEMPLATE, RequestHandler

LABELS = ["cat", "a very long label", "dog", "fish"]


@pytest.fixture
def paths(tmp_path):
    files = []
    for index, color in enumerate(("red", "green", "blue")):
        files.append(tmp_path / f"{color}.png")
        Image.new("RGB", (40 + 30 * index, 60), color).save(files[-1])
    return files


def labels_of(items):
    return [[score.label for score in item.scores] for item in items]


def test_exact_scores():
    # Cosines 0.6 and 0.8 at a scale of 10 differ by 2: the odds are e^2.
    encoder = SimpleNamespace(
        encode_files=lambda images, _: (images, torch.tensor([[0.6, 0.8], [1.0, 0.0]])),
        encode_texts=lambda *_: torch.eye(2),
        logit_scale=10.0,
        tokenizer=None,
    )
    items = classify(encoder, ["x", "y"], ["cat", "dog"], ["{}"])
    odds = math.exp(2.0)
    assert [item.image for item in items] == ["x", "y"]
    assert labels_of(items) == [["dog", "cat"], ["cat", "dog"]]
    assert items[0].scores[0].score == pytest.approx(odds / (1 + odds), abs=1e-6)
    assert items[0].scores[1].score == pytest.approx(1 / (1 + odds), abs=1e-6)
    assert items[1].scores[0].score == pytest.approx(1 / (1 + math.exp(-10.0)), abs=1e-6)


@pytest.mark.parametrize("loss", ["infonce", "sigmoid"])
@pytest.mark.parametrize("template", [None, "{}"])
def test_equals_the_pipeline(tiny_config, tiny_processor, paths, loss, template):
    torch.manual_seed(1)
    model = ClipMiniModel(tiny_config(loss=loss)).eval()
    model.processor = tiny_processor
    judge = pipeline(
        "zero-shot-image-classification",
        model=model,
        tokenizer=tiny_processor.tokenizer,
        image_processor=tiny_processor.image_processor,
    )
    options = {} if template is None else {"hypothesis_template": template}
    expected = judge([str(path) for path in paths], candidate_labels=LABELS, **options)
    answer = clipmini.classify(model, paths, LABELS, template)
    handler = RequestHandler(model)
    assert len(answer) == len(paths)
    for item, wanted in zip(answer, expected, strict=True):
        assert [score.label for score in item.scores] == [score["label"] for score in wanted]
        assert [score.score for score in item.scores] == pytest.approx([item["score"] for item in wanted], abs=1e-5)
        assert sum(score.score for score in item.scores) == pytest.approx(1.0, abs=1e-5)
        if template is None:  # and the server says the same
            served = handler({"inputs": item.image.read_bytes(), "parameters": {"candidate_labels": LABELS}})
            assert [score["label"] for score in served] == [score.label for score in item.scores]


def test_one_label_is_certain(tiny_model, paths):
    answer = clipmini.classify(tiny_model, paths[0], ["cat"])
    assert [item.scores for item in answer] == [[LabelScore("cat", 1.0)]]
    assert answer[0].label == "cat"


def test_a_pillow_image_is_classified_as_its_file(tiny_model, paths):
    with Image.open(paths[0]) as image:
        answer = clipmini.classify(tiny_model, image, LABELS)
    from_file = clipmini.classify(tiny_model, str(paths[0]), LABELS)
    assert answer[0].scores == from_file[0].scores
    assert answer.to_dict()["results"][0]["path"] is None


def test_an_unreadable_image_is_an_error(tiny_model, tmp_path):
    with pytest.raises(ValueError, match=r"none\.png does not exist"):
        clipmini.classify(tiny_model, tmp_path / "none.png", LABELS)


def test_unreadable_files_are_left_out_and_listed(tiny_model, paths):
    bad = paths[0].with_name("bad.png")
    bad.write_bytes(b"")
    answer = clipmini.classify(tiny_model, [paths[0], bad, paths[2]], LABELS)
    assert [item.image for item in answer] == [paths[0], paths[2]]
    found = answer.to_dict()
    assert [item["path"] for item in found["skipped"]] == [str(bad)]
    assert found["template"] == DEFAULT_TEMPLATE
    assert json.loads(json.dumps(found)) == found
    for item, path in zip(answer, (paths[0], paths[2]), strict=True):
        expected = clipmini.classify(tiny_model, path, LABELS)[0].scores
        assert [score.score for score in item.scores] == pytest.approx([score.score for score in expected], abs=1e-6)


def test_strict_raises(tiny_model, paths, tmp_path):
    with pytest.raises(ValueError, match=r"none\.png: does not exist"):
        clipmini.classify(tiny_model, [*paths, tmp_path / "none.png"], LABELS, strict=True)


def test_a_notebook_shows_labels_with_bars(paths):
    gone = ClassifiedImage(paths[1].with_name("gone.png"), [LabelScore("dog", 1.0)])
    shown = ClassifiedImage(paths[0], [LabelScore("<i>cat</i>", 0.75), LabelScore("dog", 0.25)])
    answer = Classification("{}", [shown, gone])
    html = answer._repr_html_()
    assert "&lt;i&gt;cat&lt;/i&gt;" in html
    assert "width:75.0px" in html
    assert (html.count("data:image/jpeg"), html.count("gone or broken")) == (1, 1)
    assert repr(answer) == "<classified: '<i>cat</i>' (75.0%) and 1 more>"


@pytest.mark.parametrize(
    ("labels", "template", "message"),
    [
        ([], "a {}", "at least one"),
        ("cat", "a {}", "a list"),
        (["cat", " "], "a {}", "Label 2 of 2 is blank"),
        (["cat", "dog", "cat"], "a {}", "'cat' is given twice"),
        (["cat"], "a photo", "'a photo' is not a template"),
        (["cat"], ["a photo"], "no {} where"),
        (["cat"], ["a {0}"], "no {} where"),
        (["cat", "a \udcff fish"], "a {}", r"label 'a \\udcff fish' is not text in UTF-8"),
        (["cat"], "\udcff {}", r"template '\\udcff \{\}' is not text in UTF-8"),
    ],
)
def test_bad_labels_and_templates(tiny_model, paths, labels, template, message):
    with pytest.raises(ValueError, match=message):
        clipmini.classify(tiny_model, paths, labels, template)


def test_other_braces_stay():
    assert fill_template(["c{a}t", "d{}g"], "{x} {}!") == ["{x} c{a}t!", "{x} d{}g!"]


def test_damaged_weights(tiny_model, paths):
    tiny_model.logit_scale.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="are NaN"):
        clipmini.classify(tiny_model, paths, LABELS)


def test_a_label_is_the_mean_direction_of_its_captions():
    vectors = {"a x": [1.0, 0.0], "a y": [0.0, 1.0], "the x": [0.6, 0.8], "the y": [0.0, 1.0]}
    encoder = SimpleNamespace(
        encode_texts=lambda captions: torch.tensor([vectors[text] for text in captions]), tokenizer=None
    )
    embeds = embed_labels(encoder, ["x", "y"], ["a {}", "the {}"])
    torch.testing.assert_close(embeds, torch.tensor([[0.8, 0.4], [0.0, 1.0]]) / torch.tensor([[0.8**0.5], [1.0]]))


def test_a_list_of_one_template_equals_the_template(tiny_model, paths):
    one = clipmini.classify(tiny_model, paths, LABELS, "a {}")
    assert clipmini.classify(tiny_model, paths, LABELS, ["a {}"]).images == one.images
    assert clipmini.classify(tiny_model, paths, LABELS, ["a {}", "two {}"]).images != one.images


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
        embed_labels(SimpleNamespace(tokenizer=None), ["x"], [])
