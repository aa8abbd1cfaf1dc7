import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmini.evaluation.retrieval import METRIC_NAMES, chance_metrics, retrieval_metrics


def unit_vectors(similarities):
    """Images along the axes, so that a caption's coordinates are its similarities to them."""
    texts = torch.tensor(similarities)
    return torch.eye(texts.shape[1]), texts


def test_recalls_by_hand():
    images, texts = unit_vectors([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.8, 0.1], [0.6, 0.7, 0.5]])
    result = retrieval_metrics(images, texts, torch.tensor([0, 0, 1, 2]), recall_at=(1, 2))
    assert result == {
        "text_to_image_r1": 0.5,
        "text_to_image_r2": 0.5,
        "text_to_image_map10": pytest.approx((1 + 1 / 3 + 1 + 1 / 3) / 4),
        "text_to_image_median_rank": 2,
        "text_to_image_mean_rank": 2,
        "image_to_text_r1": pytest.approx(2 / 3),
        "image_to_text_r2": 1.0,
        "image_to_text_map10": pytest.approx(((1 + 2 / 3) / 2 + 1 + 1 / 2) / 3),
        "image_to_text_median_rank": 1,
        "image_to_text_mean_rank": pytest.approx(4 / 3),
        "mean_recall": pytest.approx((0.5 + 0.5 + 2 / 3 + 1) / 4),
    }


@pytest.mark.parametrize("value", [0.5, math.nan], ids=["collapsed", "diverged"])
def test_a_broken_model_does_not_look_good(value):
    vectors = torch.full((20, 4), value)
    result = retrieval_metrics(vectors, vectors, torch.arange(20))
    assert list(result) == list(METRIC_NAMES)
    assert {result[name] for name in result if not name.endswith("_rank")} == {0.0}
    assert {result[name] for name in result if name.endswith("_rank")} == {20}


def test_a_set_without_queries_has_no_figures():
    result = retrieval_metrics(torch.eye(2), torch.eye(2), torch.tensor([5, 6]))
    assert all(math.isnan(value) for value in result.values())


def test_an_image_without_captions_is_a_distractor_and_no_query():
    images, texts = unit_vectors([[0.9, 0.1, 0.95], [0.1, 0.9, 0.2]])
    result = retrieval_metrics(images, texts, torch.tensor([0, 1]), recall_at=(1,))
    assert result["text_to_image_r1"] == 0.5  # image 2 stands in caption 0's way
    assert result["image_to_text_r1"] == 1.0


@settings(max_examples=25, deadline=None)
@given(num_images=st.integers(1, 9), num_captions=st.integers(1, 3), seed=st.integers(0, 10**6))
def test_order_changes_nothing_and_recall_grows_with_k(num_images, num_captions, seed):
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.arange(num_images).repeat_interleave(num_captions)
    images = torch.randn(num_images, 3, generator=generator)
    texts = torch.randn(len(image_of_text), 3, generator=generator)
    whole = retrieval_metrics(images, texts, image_of_text)
    order, text_order = (torch.randperm(len(rows), generator=generator) for rows in (images, texts))
    shuffled = retrieval_metrics(images[order], texts[text_order], order.argsort()[image_of_text[text_order]])
    assert shuffled == pytest.approx(whole)
    for direction in ("text_to_image", "image_to_text"):
        assert whole[f"{direction}_r1"] <= whole[f"{direction}_r5"] <= whole[f"{direction}_r10"]


def test_chance_by_hand():
    # 4 images; captions: 2, 1, 1, 0.
    result = chance_metrics(torch.tensor([0, 0, 1, 2]), torch.arange(4), recall_at=(1, 3, 10))
    assert result["text_to_image_r1"] == 0.25
    assert result["text_to_image_r10"] == 1.0
    assert result["image_to_text_r1"] == pytest.approx((2 / 4 + 1 / 4 + 1 / 4) / 3)
    miss_two_of_four = math.comb(2, 3) / math.comb(4, 3)
    assert result["image_to_text_r3"] == pytest.approx((1 - miss_two_of_four + 3 / 4 + 3 / 4) / 3)


def test_random_embeddings_reach_chance():
    generator = torch.Generator().manual_seed(0)
    image_of_text = torch.arange(300).repeat_interleave(5)
    results = [
        retrieval_metrics(
            torch.nn.functional.normalize(torch.randn(300, 16, generator=generator), dim=-1),
            torch.nn.functional.normalize(torch.randn(1500, 16, generator=generator), dim=-1),
            image_of_text,
        )
        for _ in range(20)
    ]
    expected = chance_metrics(image_of_text, torch.arange(300))
    for name in ("text_to_image_r10", "image_to_text_r10"):
        assert sum(result[name] for result in results) / 20 == pytest.approx(expected[name], rel=0.15)
