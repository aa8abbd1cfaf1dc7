import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmini.training import metrics
from clipmini.training.metrics import chance_metrics, retrieval_metrics, retrieval_ranks


def unit_vectors(similarities):
    """Images along the axes, so that a caption's coordinates are its similarities to them."""
    texts = torch.tensor(similarities)
    return torch.eye(texts.shape[1]), texts


def test_ranks_by_hand():
    # Rows are captions, columns images; captions 0 and 1 belong to image 0, 2 to image 1, 3 to image 2.
    images, texts = unit_vectors([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.8, 0.1], [0.6, 0.7, 0.5]])
    text_ranks, image_ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 1, 2]))
    assert text_ranks.tolist() == [0, 2, 0, 2]
    # Image 0: 0.9 beats all. Image 1: 0.8 beats 0.7. Image 2: its 0.5 ties with caption 1, which counts against it.
    assert image_ranks.tolist() == [0, 0, 1]


def test_an_images_other_captions_do_not_stand_in_the_way():
    images, texts = unit_vectors([[0.5, 0.0], [0.9, 0.0], [0.7, 0.8]])
    _, image_ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 1]))
    assert image_ranks.tolist() == [0, 0]


def test_recalls_by_hand():
    images, texts = unit_vectors([[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.8, 0.1], [0.6, 0.7, 0.5]])
    result = retrieval_metrics(images, texts, torch.tensor([0, 0, 1, 2]), recall_at=(1, 2))
    assert result == {
        "text_to_image_r1": 0.5,
        "text_to_image_r2": 0.5,
        "image_to_text_r1": pytest.approx(2 / 3),
        "image_to_text_r2": 1.0,
        "mean_recall": pytest.approx((0.5 + 0.5 + 2 / 3 + 1) / 4),
    }


def test_a_collapsed_model_does_not_look_good():
    vectors = torch.ones(20, 4) / 2
    result = retrieval_metrics(vectors, vectors, torch.arange(20))
    assert set(result.values()) == {0.0}


def test_a_diverged_model_does_not_look_good():
    vectors = torch.full((20, 4), torch.nan)
    result = retrieval_metrics(vectors, vectors, torch.arange(20))
    assert set(result.values()) == {0.0}


def test_autocast_does_not_round_similarities():
    images, texts = unit_vectors([[0.9001, 0.9], [0.9, 0.9001]])
    with torch.autocast("cpu", torch.bfloat16):
        result = retrieval_metrics(images, texts, torch.tensor([0, 1]), recall_at=(1,))
    assert result["mean_recall"] == 1.0


def test_an_image_without_captions_is_a_distractor_and_no_query():
    images, texts = unit_vectors([[0.9, 0.1, 0.95], [0.1, 0.9, 0.2]])
    result = retrieval_metrics(images, texts, torch.tensor([0, 1]), recall_at=(1,))
    assert result["text_to_image_r1"] == 0.5  # image 2 stands in caption 0's way
    assert result["image_to_text_r1"] == 1.0


@settings(max_examples=25, deadline=None)
@given(
    num_images=st.integers(1, 9), num_captions=st.integers(1, 3), chunk=st.integers(1, 7), seed=st.integers(0, 10**6)
)
def test_chunks_and_order_change_nothing_and_recall_grows_with_k(num_images, num_captions, chunk, seed):
    generator = torch.Generator().manual_seed(seed)
    image_of_text = torch.arange(num_images).repeat_interleave(num_captions)
    images = torch.randn(num_images, 3, generator=generator)
    texts = torch.randn(len(image_of_text), 3, generator=generator)
    whole = retrieval_metrics(images, texts, image_of_text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics, "CHUNK_SIZE", chunk)
        order = torch.randperm(num_images, generator=generator)
        shuffled = retrieval_metrics(images[order], texts, order.argsort()[image_of_text])
    assert shuffled == pytest.approx(whole)
    for direction in ("text_to_image", "image_to_text"):
        assert whole[f"{direction}_r1"] <= whole[f"{direction}_r5"] <= whole[f"{direction}_r10"]


def test_chance_by_hand():
    # 4 images; captions: 2, 1, 1, 0.
    result = chance_metrics(4, torch.tensor([0, 0, 1, 2]), recall_at=(1, 3, 10))
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
    expected = chance_metrics(300, image_of_text)
    for name in ("text_to_image_r10", "image_to_text_r10"):
        assert sum(result[name] for result in results) / 20 == pytest.approx(expected[name], rel=0.15)
