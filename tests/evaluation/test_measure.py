import pytest
import torch
from torch.nn.functional import normalize

from clipmini.evaluation.measure import Embeddings, embed_pairs, measure_pairs, measure_retrieval, pair_similarities
from clipmini.evaluation.retrieval import retrieval_metrics
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


def test_misses_are_the_lowest_ranks_with_the_images_that_beat_them():
    embeds = make_embeddings()
    result = measure_retrieval(embeds, num_misses=5, num_resamples=10)
    similarity = embeds.texts @ embeds.images.T
    places = (similarity > similarity[torch.arange(40), embeds.row_of_text][:, None]).sum(dim=1) + 1
    assert [miss.rank for miss in result.misses] == sorted(places.tolist(), reverse=True)[:5]
    for miss in result.misses:
        text = embeds.captions.index(miss.caption)
        assert miss.row == embeds.row_of_text[text]
        assert miss.similarity == pytest.approx(similarity[text, miss.row].item())
        assert len(miss.beaten_by) == min(10, miss.rank - 1)
        rows = [row for row, _ in miss.beaten_by]
        assert rows == similarity[text].argsort(descending=True)[: len(rows)].tolist()


def test_a_perfect_model_has_no_misses():
    embeds = make_embeddings()
    perfect = Embeddings(**{**vars(embeds), "texts": embeds.images[embeds.row_of_text]})
    assert measure_retrieval(perfect, num_resamples=10).misses == []


def test_images_and_captions_can_be_left_out():
    embeds = make_embeddings(num_images=5)
    rest = embeds.without([1, 3], [0, 9])
    assert rest.image_ids.tolist() == [5, 11, 17]
    assert rest.captions == ["caption 1", "caption 4", "caption 5", "caption 8"]
    assert rest.row_of_text.tolist() == [0, 1, 1, 2]
    assert rest.text_image_ids.tolist() == [5, 11, 11, 17]
    assert torch.equal(rest.texts, embeds.texts[[1, 4, 5, 8]])
