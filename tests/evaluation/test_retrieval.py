import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmini.evaluation import retrieval as ranking
from clipmini.evaluation.retrieval import METRIC_NAMES, chance_metrics, rank_candidates, retrieval_metrics


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


# Rows are captions, columns images; captions 0 and 1 belong to image 0, 2 to image 1, 3 to image 2.
SIMILARITIES = [[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.8, 0.1], [0.6, 0.7, 0.5]]
IDS = torch.tensor([0, 0, 1, 2])


def ranks_of(*args):
    return [ranking.ranks.tolist() for ranking in rank_candidates(*args, num_kept=0)]


def test_ranks_by_hand():
    # Image 0: 0.9 beats all. Image 1: 0.8 beats 0.7. Image 2: its 0.5 ties with caption 1, which counts against it.
    assert ranks_of(*unit_vectors(SIMILARITIES), IDS) == [[0, 2, 0, 2], [0, 0, 1]]


def test_an_images_other_captions_do_not_lower_its_rank():
    images, texts = unit_vectors([[0.5, 0.0], [0.9, 0.0], [0.7, 0.8]])
    assert ranks_of(images, texts, torch.tensor([0, 0, 1]))[1] == [0, 0]


def test_several_images_may_share_an_id():
    # Images 0 and 2 are copies: the caption of either finds both, and neither lowers the rank of the other.
    images, texts = unit_vectors([[0.2, 0.5, 0.6], [0.1, 0.9, 0.3]])
    assert ranks_of(images, texts, torch.tensor([7, 3]), torch.tensor([7, 3, 7])) == [[0, 0], [0, 0, 0]]


def test_a_query_without_a_correct_candidate_has_no_rank():
    images, texts = unit_vectors([[0.9, 0.1], [0.1, 0.9]])
    assert ranks_of(images, texts, torch.tensor([0, 5])) == [[0, -1], [0, -1]]


def test_kept_candidates_by_hand():
    of_text, of_image = rank_candidates(*unit_vectors(SIMILARITIES), IDS, num_kept=2)
    assert of_text.wrong_rows.tolist() == [[2, 1], [2, 1], [0, 2], [1, 0]]
    assert of_text.num_correct.tolist() == [1, 1, 1, 1]
    assert of_image.wrong_rows.tolist() == [[3, 2], [3, 1], [1, 0]]
    assert of_image.correct[0].tolist() == pytest.approx([0.9, 0.3])
    assert of_image.num_correct.tolist() == [2, 1, 1]
    # Captions 1 and 3 rank their images third.
    assert of_text.average_precision().tolist() == [1, 0, 1, 0]
    # Image 0: its captions are at ranks 1 (0.9) and 3 (0.3); only two ranks count.
    assert of_image.average_precision().tolist() == pytest.approx([1 / 2, 1, 1 / 2])


def test_of_ranks_alone_there_is_no_average_precision():
    for result in rank_candidates(*unit_vectors(SIMILARITIES), IDS, num_kept=0):
        assert result.correct.shape[1] == result.wrong.shape[1] == 0
        assert result.average_precision().isnan().all()


def test_average_precision_by_hand():
    # Correct candidates at ranks 1, 3 and 4 of five: (1/1 + 2/3 + 3/4) / 3.
    images, texts = unit_vectors([[0.9], [0.8], [0.7], [0.6], [0.5]])
    _, of_image = rank_candidates(images, texts, torch.tensor([0, 1, 0, 0, 1]))
    assert of_image.average_precision().tolist() == pytest.approx([(1 + 2 / 3 + 3 / 4) / 3])


def test_average_precision_of_more_correct_candidates_than_ranks():
    # Twelve correct candidates before all wrong ones: the first ten ranks hold ten of them.
    images, texts = unit_vectors([[1 - 0.01 * rank] for rank in range(14)])
    _, of_image = rank_candidates(images, texts, torch.tensor([0] * 12 + [1] * 2))
    assert of_image.average_precision().tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("value", [0.5, torch.nan], ids=["collapsed", "diverged"])
def test_ranks_of_a_broken_model_are_the_last(value):
    vectors = torch.full((20, 4), value)
    ids = torch.arange(20)
    for result in rank_candidates(vectors, vectors, ids):
        assert result.ranks.unique().tolist() == [19]
        assert result.average_precision().unique().tolist() == [0]


def test_a_model_that_collapsed_to_one_direction_is_last_everywhere_in_every_block():
    # Across blocks a product of the same vectors may be rounded differently; a tie must stay a tie.
    image, text = torch.nn.functional.normalize(torch.randn(2, 96, generator=torch.Generator().manual_seed(0)), dim=1)
    num_images, num_texts = ranking.IMAGE_BLOCK + 37, ranking.TEXT_BLOCK + 411
    of_text, of_image = rank_candidates(
        image.expand(num_images, -1), text.expand(num_texts, -1), torch.arange(num_texts) % num_images
    )
    assert of_text.ranks.unique().tolist() == [num_images - 1]
    assert (of_image.ranks + of_image.num_correct).unique().tolist() == [num_texts]


def test_autocast_does_not_round_similarities():
    images, texts = unit_vectors([[0.9001, 0.9], [0.9, 0.9001]])
    with torch.autocast("cpu", torch.bfloat16):
        assert ranks_of(images, texts, torch.tensor([0, 1])) == [[0, 0], [0, 0]]


def test_a_wrong_number_of_ids_is_refused():
    images, texts = unit_vectors(SIMILARITIES)
    with pytest.raises(ValueError, match="4 captions with 3"):
        rank_candidates(images, texts, IDS[:3])


def ranks_of_whole_matrix(similarity, query_ids, candidate_ids):
    """Compute ranks and average precisions as they are defined."""
    ranks, precisions = [], []
    for row, query in zip(similarity.tolist(), query_ids.tolist(), strict=True):
        pairs = list(zip(row, candidate_ids.tolist(), strict=True))
        correct = sorted((value for value, candidate in pairs if candidate == query), reverse=True)
        wrong = [value for value, candidate in pairs if candidate != query]
        if not correct:
            ranks.append(-1)
            precisions.append(float("nan"))
            continue
        correct_ranks = [
            sum(other >= value for other in wrong) + index for index, value in enumerate(correct, start=1)
        ]
        ranks.append(correct_ranks[0] - 1)
        hits = [index / rank for index, rank in enumerate(correct_ranks, 1) if rank <= 10]
        precisions.append(sum(hits) / min(len(correct), 10))
    return ranks, precisions


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_images=st.integers(1, 30), num_texts=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_blocks_agree_with_the_whole_matrix(data, num_images, num_texts, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: their products are exact, and many tie.
    images = torch.randint(-2, 3, (num_images, 3), generator=generator).float()
    texts = torch.randint(-2, 3, (num_texts, 3), generator=generator).float()
    num_ids = data.draw(st.integers(1, 30))
    image_ids = torch.randint(num_ids, (num_images,), generator=generator)
    text_image_ids = torch.randint(num_ids, (num_texts,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "IMAGE_BLOCK", data.draw(st.integers(1, 31)))
        patch.setattr(ranking, "TEXT_BLOCK", data.draw(st.integers(1, 41)))
        of_text, of_image = rank_candidates(images, texts, text_image_ids, image_ids)
        assert ranks_of(images, texts, text_image_ids, image_ids) == [of_text.ranks.tolist(), of_image.ranks.tolist()]
    similarity = texts @ images.T
    for found, (ranks, precisions) in (
        (of_text, ranks_of_whole_matrix(similarity, text_image_ids, image_ids)),
        (of_image, ranks_of_whole_matrix(similarity.T, image_ids, text_image_ids)),
    ):
        assert found.ranks.tolist() == ranks
        assert found.average_precision().tolist() == pytest.approx(precisions, nan_ok=True)
    for text, (rows, values) in enumerate(zip(of_text.wrong_rows, of_text.wrong, strict=True)):
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            if row >= 0:
                assert similarity[text, row] == value
                assert image_ids[row] != text_image_ids[text]
