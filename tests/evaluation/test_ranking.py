import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmini.evaluation import retrieval as ranking
from clipmini.evaluation.retrieval import rank_candidates


def unit_vectors(similarities):
    """Images along the axes, so that a caption's coordinates are its similarities to them."""
    texts = torch.tensor(similarities)
    return torch.eye(texts.shape[1]), texts


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
def test_a_broken_model_does_not_look_good(value):
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
