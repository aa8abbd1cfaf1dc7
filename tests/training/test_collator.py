import pytest
import torch
from PIL import Image

from clipmini.data.augment import normalize_pixels
from clipmini.training.batches import ClipMiniCollator
from modeling_clipmini.images_clipmini import ImageError


def make_rows():
    return [
        {
            "image": Image.new("RGB", (40, 30), "red"),
            "captions": ["one", "a much longer caption of it"],
            "image_id": 4,
        },
        {"image": Image.new("RGB", (30, 50), "blue"), "captions": ["short"], "image_id": 9},
    ]


def test_pads_to_the_longest_and_passes_ids(tiny_processor):
    torch.manual_seed(1)
    batch = ClipMiniCollator(tiny_processor)(make_rows())
    assert batch["image_ids"].tolist() == [4, 9]
    assert batch["pixel_values"].shape == (2, 3, 160, 160)  # test_resnet's size
    longest = max(int(mask.sum()) for mask in batch["attention_mask"])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, longest)


def test_rows_of_an_epoch_give_bytes_that_normalize_to_the_same(tiny_processor):
    plain = ClipMiniCollator(tiny_processor)(make_rows())
    items = [{**row, "row": index, "caption": "a"} for index, row in enumerate(make_rows())]
    batch = ClipMiniCollator(tiny_processor)(items)
    assert batch["pixels"].dtype is torch.uint8
    assert torch.equal(normalize_pixels(tiny_processor.image_processor, batch["pixels"]), plain["pixel_values"])


def test_draws_every_caption_and_follows_the_seed(tiny_processor):
    collate = ClipMiniCollator(tiny_processor)

    def draw(seed):
        torch.manual_seed(seed)
        return [int(collate(make_rows())["attention_mask"][0].sum()) for _ in range(12)]

    assert draw(0) == draw(0)
    assert len(set(draw(0))) == 2


def test_cached_features_stand_for_images_and_captions(tiny_processor):
    rows = [
        {"image_id": 5, "row": 0, "pooled_image": torch.ones(3), "pooled_text": torch.tensor([1.0, 1.0])},
        {"image_id": 7, "row": 1, "pooled_image": torch.zeros(3), "pooled_text": torch.tensor([2.0, 2.0])},
    ]
    batch = ClipMiniCollator(tiny_processor)(rows)
    assert set(batch) == {"image_ids", "rows", "pooled_image", "pooled_text"}
    assert batch["rows"].tolist() == [0, 1]
    assert batch["pooled_text"].tolist() == [[1.0, 1.0], [2.0, 2.0]]


def test_very_long_captions_are_cut(tiny_processor):
    row = {"image": Image.new("RGB", (8, 8)), "captions": ["word " * 10_000], "image_id": 0}
    assert ClipMiniCollator(tiny_processor)([row])["input_ids"].shape[1] == 64


def test_a_image_that_cannot_be_read_is_named(tiny_processor, tmp_path):
    (tmp_path / "7.png").write_bytes(b"")
    row = {"image": {"bytes": None, "path": str(tmp_path / "7.png")}, "captions": ["a"], "image_id": 3}
    with pytest.raises(ImageError) as caught:
        ClipMiniCollator(tiny_processor)([*make_rows(), row])
    assert str(caught.value) == f"{tmp_path / '7.png'}: is empty (zero bytes)"
    with pytest.raises(ImageError, match=r"^image_id 3: is empty"):
        ClipMiniCollator(tiny_processor)([*make_rows(), {**row, "image": {"bytes": b"", "path": None}}])
