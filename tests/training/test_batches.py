import numpy as np
import pytest
import torch
from PIL import Image

from clipmini.data.augment import normalize_pixels
from clipmini.data.pairs import PairDataset
from clipmini.training.batches import ClipMiniCollator, EpochPairs, PairSampler, draw_index, pool_by_length
from modeling_clipmini.images_clipmini import ImageError


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


def test_each_image_comes_up_once_an_epoch_in_a_new_order():
    sampler = PairSampler(50, seed=3)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == [(row, 0) for row in range(50)]
    assert sorted(second) == [(row, 1) for row in range(50)]
    assert [row for row, _ in first] != [row for row, _ in second]
    assert epoch(PairSampler(50, seed=3), 1) == second
    assert epoch(PairSampler(50, seed=4), 1) != second


def test_captions_are_covered_evenly():
    drawn = [draw_index(5, epoch, 0, 17) for epoch in range(35)]
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 35, 5))
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15]


def test_each_caption_meets_each_view(toy_pairs):
    views, captions = np.array([[[0.0], [1.0]]], np.float32), np.array([[0.0], [1.0]], np.float32)
    pairs = EpochPairs(PairDataset(toy_pairs.select([0]), image_features=views, text_features=captions))
    items = [pairs[0, epoch] for epoch in range(30)]
    met = {(item["pooled_image"].item(), item["pooled_text"].item()) for item in items}
    assert met == {(0, 0), (0, 1), (1, 0), (1, 1)}


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
    assert batch["image_ids"].tolist() == [5, 7]
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


CAPTIONS = ["a red square", "b", "a much longer caption about a green disc", "blue bar", "c"]


@pytest.mark.parametrize("num_groups", [1, 2, 4, 5, 9])
def test_groups_give_what_the_whole_batch_gives(tiny_model, tiny_processor, num_groups):
    batch = tiny_processor(text=CAPTIONS)
    whole = tiny_model.pool_texts(**batch)
    grouped = pool_by_length(tiny_model, batch["input_ids"], batch["attention_mask"], num_groups)
    torch.testing.assert_close(grouped, whole, atol=1e-6, rtol=1e-5)


def test_each_group_is_padded_to_its_own_longest(tiny_model, tiny_processor, monkeypatch):
    shapes = []
    pool_texts = tiny_model.pool_texts

    def noting(input_ids, attention_mask):
        shapes.append(tuple(input_ids.shape))
        return pool_texts(input_ids, attention_mask)

    monkeypatch.setattr(tiny_model, "pool_texts", noting)
    batch = tiny_processor(text=CAPTIONS)
    lengths = sorted(batch["attention_mask"].sum(dim=1).tolist())
    pool_by_length(tiny_model, batch["input_ids"], batch["attention_mask"], 2)
    assert shapes == [(3, lengths[2]), (2, lengths[4])]


def test_every_caption_gets_its_gradient(tiny_model, tiny_processor):
    batch = tiny_processor(text=CAPTIONS)
    weights = torch.rand(len(CAPTIONS), tiny_model.config.text_config.hidden_size)
    gradients = []
    for pooled in (
        tiny_model.pool_texts(**batch),
        pool_by_length(tiny_model, batch["input_ids"], batch["attention_mask"], 3),
    ):
        tiny_model.zero_grad()
        (pooled * weights).sum().backward()
        gradients.append(tiny_model.get_input_embeddings().weight.grad.clone())
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-4)
