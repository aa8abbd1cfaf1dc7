import pytest

from clipmini.training.metrics import METRIC_NAMES
from clipmini.training.publish import render_model_card
from clipmini.training.recipes import load_recipe


@pytest.fixture
def results():
    recalls = {"chance": 0.1, "before": 0.2, "after": 0.3125}
    split = {name: dict.fromkeys(METRIC_NAMES, value) for name, value in recalls.items()}
    split.update(num_images=32, num_captions=160)
    return {"num_train_images": 168, "num_skipped": 2, "splits": {"validation": split, "test": split}}


def test_the_card_tells_what_was_done_and_reached(results, tiny_config):
    card = render_model_card(load_recipe("demo", ["source=my/pictures"]), tiny_config(), results)
    assert "`my/pictures`, 168 pictures to train on; 2 pictures or captions" in card.text
    assert "Frozen: vision tower and text tower." in card.text
    assert card.text.count("| text to image | 31.2 | 31.2 | 31.2 |") == 2
    assert "32 pictures, 160 captions (the checkpoint was chosen on this split)" in card.text
    assert "captions of COCO and Flickr30k" in card.text  # what MiniLM has read belongs to every figure
    assert "{{" not in card.content
    assert "{%" not in card.content


def test_its_metadata_name_hub_towers_and_claim_no_licence(results, tiny_config):
    card = render_model_card(load_recipe("demo", ["model=resnet50-distilbert"]), tiny_config(), results)
    assert card.data.base_model == ["timm/resnet50.a1_in1k", "distilbert/distilbert-base-uncased"]
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert card.data.license is None
