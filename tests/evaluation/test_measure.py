from dataclasses import replace

import pytest
import torch
from torch.nn.functional import normalize

from clipmini.data.pairs import PairDataset
from clipmini.evaluation import measure
from clipmini.evaluation.measure import (
    Embeddings,
    draw_bank,
    embed_pairs,
    measure_normalized,
    measure_pairs,
    measure_retrieval,
    pair_similarities,
    pick_examples,
)
from clipmini.evaluation.retrieval import retrieval_metrics
from clipmini.inference.bank import Bank
from clipmini.inference.encoders import load_encoder


def make_embeddings(num_images=20, captions=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    row_of_text = torch.arange(num_images).repeat_interleave(captions)
    image_ids = torch.arange(num_images) * 3 + 5
    return Embeddings(
        images=normalize(torch.randn(num_images, 8, generator=generator), dim=-1),
        texts=normalize(torch.randn(len(row_of_text), 8, generator=generator), dim=-1),
        image_ids=image_ids,
        captions=[f"caption {number}" for number in range(len(row_of_text))],
        row_of_text=row_of_text,
    )


def test_a_split_is_measured_as_in_training(tiny_folder, tiny_model, tiny_processor, toy_pairs):
    result = measure_retrieval(embed_pairs(load_encoder(tiny_folder), toy_pairs), num_resamples=10)
    values = {name: interval.value for name, interval in result.metrics.items()}
    assert values == pytest.approx(measure_pairs(tiny_model, toy_pairs))
    assert list(result.by_width) == [16]


def test_all_parts_agree():
    embeds = make_embeddings()
    result = measure_retrieval(embeds, widths=(4, 2), precisions=("int8", "binary"), num_resamples=10)
    assert list(result.by_width) == [2, 4, 8]
    cut = [normalize(rows[:, :4], dim=-1) for rows in (embeds.images, embeds.texts)]
    assert result.by_width[4] == pytest.approx(retrieval_metrics(*cut, embeds.text_image_ids, embeds.image_ids))
    assert list(result.by_precision) == ["float32", "int8", "binary"]
    assert result.by_precision["float32"] == result.by_width[8]
    for direction, curve in result.recall_curve.items():
        assert len(curve) == (20 if direction == "text_to_image" else 40)
        assert curve == sorted(curve)
        assert curve[4] == result.metrics[f"{direction}_r5"].value
        assert curve[-1] == 1
        chance = result.chance_curve[direction]
        assert len(chance) == len(curve)
        assert chance[4] == pytest.approx(result.chance[f"{direction}_r5"])
        assert chance[-1] == pytest.approx(1)
    matching, others = pair_similarities(embeds)
    assert len(matching) == 40
    assert len(others) == 20 * 40 - 40


def test_copies_that_share_an_id_are_no_other_images():
    embeds = replace(make_embeddings(num_images=3, captions=1), image_ids=torch.tensor([4, 4, 9]))
    similarity = embeds.texts @ embeds.images.T
    _, others = pair_similarities(embeds)
    assert sorted(others) == pytest.approx(sorted([*similarity[:2, 2].tolist(), *similarity[2, :2].tolist()]))


def test_scores_without_hubs_by_hand():
    """Both captions find the first image, until how well each image fits the bank's caption is taken from that."""
    images = torch.tensor([[0.8, 0.6, 0.0], [0.0, 0.8, 0.6]])
    texts = torch.tensor([[1.0, 0.0, 0.0], [0.6, 0.8, 0.0]])
    embeds = Embeddings(images, texts, torch.tensor([3, 8]), ["one", "two"], torch.tensor([0, 1]))
    bank = Bank(torch.tensor([[0.8, 0.6, 0.0]]).half(), torch.tensor([[0.0, 1.0, 0.0]]).half(), 10.0)
    widened = embeds.normalized(bank)
    scores = torch.tensor([[0.8, 0.96], [0.0, 0.64]])  # cosines
    scores -= torch.tensor([[1.0], [0.48]])  # of the images with the caption of the bank
    scores -= torch.tensor([[0.0, 0.8]])  # of the captions with its image
    torch.testing.assert_close(widened.images @ widened.texts.T, scores, atol=1e-3, rtol=0)
    result = measure_normalized(embeds, bank)
    assert embeds.scores()["text_to_image"].ranks.tolist() == [0, 1]
    assert result.scores["text_to_image"].ranks.tolist() == [0, 0]
    assert (measure_retrieval(embeds, num_resamples=1).never_first, result.never_first) == (0.5, 0)


def test_a_bank_is_drawn_by_its_seed(tiny_model, toy_pairs, monkeypatch):
    for name, number in {"MIN_BANK": 1, "NUM_BANK_TEXTS": 5, "NUM_BANK_IMAGES": 4}.items():
        monkeypatch.setattr(measure, name, number)
    first, again, other = (draw_bank(tiny_model, PairDataset(toy_pairs), seed) for seed in (1, 1, 2))
    assert first.sizes == {"num_captions": 5, "num_images": 4}
    for kind in ("texts", "images"):
        assert torch.equal(getattr(first, kind), getattr(again, kind))
        assert not torch.equal(getattr(first, kind), getattr(other, kind))


def test_each_direction_ranks_by_its_own_prior():
    embeds, others = make_embeddings(), make_embeddings(seed=1)
    bank = Bank(others.texts.half(), others.images.half(), 20.0)
    result = measure_normalized(embeds, bank)
    cosines = embeds.images @ embeds.texts.T
    of_images = cosines - bank.prior_of_images(embeds.images)[:, None]
    of_texts = cosines - bank.prior_of_texts(embeds.texts)
    own = embeds.row_of_text
    expected = (of_images > of_images[own, torch.arange(40)]).sum(dim=0)
    assert torch.equal(result.scores["text_to_image"].ranks, expected)
    best = of_texts.masked_fill(own != torch.arange(20)[:, None], -torch.inf).max(dim=1, keepdim=True).values
    assert torch.equal(result.scores["image_to_text"].ranks, (of_texts > best).sum(dim=1))
    by_cosine = measure_retrieval(embeds, num_resamples=10)
    for measured, scores in ((by_cosine, cosines), (result, of_images)):
        assert measured.never_first == 1 - len(scores.argmax(dim=0).unique()) / 20
    assert set(result.metrics) == set(by_cosine.metrics)


def test_answers_hold_the_first_images_and_the_correct_one():
    embeds = make_embeddings()
    answers = measure_retrieval(embeds, num_resamples=10).answers
    similarity = embeds.texts @ embeds.images.T
    places = (similarity > similarity[torch.arange(40), embeds.row_of_text][:, None]).sum(dim=1) + 1
    assert (answers.num_queries, answers.num_right) == (40, int((places == 1).sum()))
    worst = [next(found.rank for found in answer.found if found.is_correct) for answer in answers.worst]
    assert worst == sorted(places.tolist(), reverse=True)[:10]
    for answer in (*answers.right, *answers.wrong, *answers.worst):
        text = embeds.captions.index(answer.caption)
        place, order = int(places[text]), similarity[text].argsort(descending=True).tolist()
        ranks = [1, 2, 3, max(4, place)]
        assert [found.rank for found in answer.found] == ranks
        assert [found.row for found in answer.found] == [order[rank - 1] for rank in ranks]
        assert [found.is_correct for found in answer.found] == [rank == place for rank in ranks]
        assert [found.similarity for found in answer.found] == pytest.approx(
            [similarity[text, found.row].item() for found in answer.found]
        )


def test_examples_are_not_chosen_by_their_results():
    is_right = torch.arange(1000) % 10 != 0
    right, wrong = pick_examples(is_right)
    assert (len(right), len(wrong)) == (8, 8)
    assert is_right[right].all()
    assert not is_right[wrong].any()
    better = is_right.clone()
    better[wrong[0]] = True
    others = pick_examples(better)  # another model is shown by the same queries, but where its answers differ
    assert set(others[0]) - set(right) <= {wrong[0]}
    assert others[1][:7] == wrong[1:]


@pytest.mark.parametrize(("num_right", "nums"), [(0, (0, 8)), (2, (2, 2)), (28, (2, 2)), (30, (8, 0))])
def test_there_are_as_many_successes_as_failures(num_right, nums):
    assert tuple(map(len, pick_examples(torch.arange(30) < num_right))) == nums


def test_a_perfect_model_has_no_failures():
    embeds = make_embeddings()
    perfect = Embeddings(**{**vars(embeds), "texts": embeds.images[embeds.row_of_text]})
    answers = measure_retrieval(perfect, num_resamples=10).answers
    assert (answers.num_right, len(answers.right), answers.wrong, answers.worst) == (40, 8, [], [])


def test_images_and_captions_can_be_left_out():
    embeds = make_embeddings(num_images=5)
    rest = embeds.without([1, 3], [0, 9])
    assert rest.image_ids.tolist() == [5, 11, 17]
    assert rest.captions == ["caption 1", "caption 4", "caption 5", "caption 8"]
    assert rest.row_of_text.tolist() == [0, 1, 1, 2]
    assert rest.text_image_ids.tolist() == [5, 11, 11, 17]
    assert torch.equal(rest.texts, embeds.texts[[1, 4, 5, 8]])
