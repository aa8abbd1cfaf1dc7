import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmini.training import ranking
from clipmini.training.ranking import nearest_answers, retrieval_ranks


def unit_vectors(similarities):
    """Images along the axes, so that a caption's coordinates are its similarities to them."""
    texts = torch.tensor(similarities)
    return torch.eye(texts.shape[1]), texts


# Rows are captions, columns images; captions 0 and 1 belong to image 0, 2 to image 1, 3 to image 2.
SIMILARITIES = [[0.9, 0.1, 0.2], [0.3, 0.4, 0.5], [0.2, 0.8, 0.1], [0.6, 0.7, 0.5]]
IDS = torch.tensor([0, 0, 1, 2])


def test_ranks_by_hand():
    text_ranks, image_ranks = retrieval_ranks(*unit_vectors(SIMILARITIES), IDS)
    assert text_ranks.tolist() == [0, 2, 0, 2]
    # Image 0: 0.9 beats all. Image 1: 0.8 beats 0.7. Image 2: its 0.5 ties with caption 1, which counts against it.
    assert image_ranks.tolist() == [0, 0, 1]


def test_an_images_other_captions_do_not_stand_in_the_way():
    images, texts = unit_vectors([[0.5, 0.0], [0.9, 0.0], [0.7, 0.8]])
    _, image_ranks = retrieval_ranks(images, texts, torch.tensor([0, 0, 1]))
    assert image_ranks.tolist() == [0, 0]


def test_several_images_may_share_an_id():
    # Images 0 and 2 are copies: the caption of either finds both, and neither stands in the other's way.
    images, texts = unit_vectors([[0.2, 0.5, 0.6], [0.1, 0.9, 0.3]])
    text_ranks, image_ranks = retrieval_ranks(images, texts, torch.tensor([7, 3]), torch.tensor([7, 3, 7]))
    assert text_ranks.tolist() == [0, 0]
    assert image_ranks.tolist() == [0, 0, 0]


def test_a_query_without_a_right_answer_has_no_rank():
    images, texts = unit_vectors([[0.9, 0.1], [0.1, 0.9]])
    text_ranks, image_ranks = retrieval_ranks(images, texts, torch.tensor([0, 5]))
    assert text_ranks.tolist() == [0, -1]
    assert image_ranks.tolist() == [0, -1]


def test_nearest_answers_by_hand():
    of_text, of_image = nearest_answers(*unit_vectors(SIMILARITIES), IDS, num_kept=2)
    assert of_text.other_rows.tolist() == [[2, 1], [2, 1], [0, 2], [1, 0]]
    assert of_text.num_own.tolist() == [1, 1, 1, 1]
    assert of_image.other_rows.tolist() == [[3, 2], [3, 1], [1, 0]]
    assert of_image.own[0].tolist() == pytest.approx([0.9, 0.3])
    assert of_image.num_own.tolist() == [2, 1, 1]
    # Captions 1 and 3 find their images in third place.
    assert of_text.average_precision().tolist() == [1, 0, 1, 0]
    # Image 0: its captions are in places 1 (0.9) and 3 (0.3); only two places count.
    assert of_image.average_precision().tolist() == pytest.approx([1 / 2, 1, 1 / 2])


def test_average_precision_by_hand():
    # Right answers in places 1, 3 and 4 of five: (1/1 + 2/3 + 3/4) / 3.
    images, texts = unit_vectors([[0.9], [0.8], [0.7], [0.6], [0.5]])
    _, of_image = nearest_answers(images, texts, torch.tensor([0, 1, 0, 0, 1]))
    assert of_image.average_precision().tolist() == pytest.approx([(1 + 2 / 3 + 3 / 4) / 3])


def test_average_precision_of_more_right_answers_than_places():
    # Twelve right answers in front of all wrong ones: ten places hold ten of them.
    images, texts = unit_vectors([[1 - 0.01 * place] for place in range(14)])
    _, of_image = nearest_answers(images, texts, torch.tensor([0] * 12 + [1] * 2))
    assert of_image.average_precision().tolist() == pytest.approx([1.0])


@pytest.mark.parametrize("value", [0.5, torch.nan], ids=["collapsed", "diverged"])
def test_a_broken_model_does_not_look_good(value):
    vectors = torch.full((20, 4), value)
    ids = torch.arange(20)
    assert [ranks.unique().tolist() for ranks in retrieval_ranks(vectors, vectors, ids)] == [[19], [19]]
    for neighbours in nearest_answers(vectors, vectors, ids):
        assert neighbours.average_precision().unique().tolist() == [0]


def test_autocast_does_not_round_similarities():
    images, texts = unit_vectors([[0.9001, 0.9], [0.9, 0.9001]])
    with torch.autocast("cpu", torch.bfloat16):
        ranks = retrieval_ranks(images, texts, torch.tensor([0, 1]))
    assert [rank.tolist() for rank in ranks] == [[0, 0], [0, 0]]


def test_ids_that_do_not_fit_are_refused():
    images, texts = unit_vectors(SIMILARITIES)
    with pytest.raises(ValueError, match="4 captions with 3"):
        retrieval_ranks(images, texts, IDS[:3])


def ranks_of_whole_matrix(similarity, query_ids, answer_ids):
    """The definition, word by word."""
    ranks, precisions = [], []
    for row, query in zip(similarity.tolist(), query_ids.tolist(), strict=True):
        own = sorted((value for value, answer in zip(row, answer_ids.tolist(), strict=True) if answer == query))[::-1]
        others = [value for value, answer in zip(row, answer_ids.tolist(), strict=True) if answer != query]
        if not own:
            ranks.append(-1)
            precisions.append(float("nan"))
            continue
        places = [sum(other >= value for other in others) + index + 1 for index, value in enumerate(own)]
        ranks.append(places[0] - 1)
        hits = [(index + 1) / place for index, place in enumerate(places) if place <= 10]
        precisions.append(sum(hits) / min(len(own), 10))
    return ranks, precisions


@settings(max_examples=60, deadline=None)
@given(data=st.data(), num_images=st.integers(1, 30), num_texts=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_blocks_give_what_the_whole_matrix_gives(data, num_images, num_texts, seed):
    generator = torch.Generator().manual_seed(seed)
    # Small whole numbers: their products are exact, and many tie.
    images = torch.randint(-2, 3, (num_images, 3), generator=generator).float()
    texts = torch.randint(-2, 3, (num_texts, 3), generator=generator).float()
    num_ids = data.draw(st.integers(1, 30))
    image_ids = torch.randint(num_ids, (num_images,), generator=generator)
    text_ids = torch.randint(num_ids, (num_texts,), generator=generator)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranking, "IMAGE_BLOCK", data.draw(st.integers(1, 31)))
        patch.setattr(ranking, "TEXT_BLOCK", data.draw(st.integers(1, 41)))
        text_ranks, image_ranks = retrieval_ranks(images, texts, text_ids, image_ids)
        of_text, of_image = nearest_answers(images, texts, text_ids, image_ids)
    similarity = texts @ images.T
    for ranks, near, whole in (
        (text_ranks, of_text, ranks_of_whole_matrix(similarity, text_ids, image_ids)),
        (image_ranks, of_image, ranks_of_whole_matrix(similarity.T, image_ids, text_ids)),
    ):
        assert ranks.tolist() == whole[0]
        assert near.average_precision().tolist() == pytest.approx(whole[1], nan_ok=True)
    for text, (rows, values) in enumerate(zip(of_text.other_rows, of_text.others, strict=True)):
        for row, value in zip(rows.tolist(), values.tolist(), strict=True):
            if row >= 0:
                assert similarity[text, row] == value
                assert image_ids[row] != text_ids[text]
