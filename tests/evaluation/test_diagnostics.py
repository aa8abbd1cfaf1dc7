import math

import pytest
import torch

from clipmini.evaluation import diagnostics
from clipmini.evaluation.diagnostics import PRECISIONS, diagnose, effective_rank, quantize, truncate, uniformity


def unit(rows):
    return torch.nn.functional.normalize(torch.tensor(rows, dtype=torch.float), dim=-1)


def random_unit(count, width, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def trained(num_images=50, captions=2, noise=0.1):
    """Captions close to their images."""
    images = random_unit(num_images, 16)
    ids = torch.arange(num_images).repeat_interleave(captions)
    texts = torch.nn.functional.normalize(images[ids] + noise * random_unit(len(ids), 16, seed=1), dim=-1)
    return images, texts, ids


def test_figures_by_hand():
    # Two images at right angles; a caption on each.
    result = diagnose(torch.eye(2), torch.eye(2), torch.tensor([0, 1]), temperature=0.05)
    assert result.modality_gap == 0
    assert result.alignment == 0
    assert (result.own_similarity, result.other_similarity) == (1, 0)
    assert result.image_uniformity == pytest.approx(-4)  # exp(-2 * 2)
    assert result.image_effective_rank == pytest.approx(1)  # they differ along one line
    assert result.temperature == 0.05
    assert result.faults == ()


def test_gap_and_alignment_of_opposite_sides():
    result = diagnose(unit([[1, 0], [1, 0]]), unit([[-1, 0], [-1, 0]]), torch.tensor([0, 1]))
    assert result.modality_gap == 2
    assert result.alignment == 4


def test_effective_rank_counts_even_dimensions():
    assert effective_rank(torch.cat([torch.eye(5), -torch.eye(5)])) == pytest.approx(5)
    assert effective_rank(torch.ones(7, 4)) == 1
    assert math.isnan(effective_rank(torch.full((3, 2), torch.nan)))


def test_effective_rank_is_that_of_the_singular_values():
    rows = random_unit(30, 6)
    shares = torch.linalg.svdvals(rows - rows.mean(dim=0))
    shares = shares / shares.sum()
    assert effective_rank(rows) == pytest.approx(math.exp(-(shares * shares.log()).sum()), rel=1e-5)


def test_uniformity_of_many_rows_is_taken_in_blocks_and_of_a_sample(monkeypatch):
    rows = random_unit(200, 8)
    distances = torch.pdist(rows)
    expected = (-2 * distances.square()).exp().mean().log().item()
    monkeypatch.setattr(diagnostics, "BLOCK", 7)
    assert uniformity(rows) == pytest.approx(expected, abs=1e-5)
    monkeypatch.setattr(diagnostics, "MAX_VECTORS", 150)
    assert uniformity(rows) == pytest.approx(expected, abs=0.2)
    assert math.isnan(uniformity(rows[:1]))


def test_similarities_are_means_over_pairs_however_ids_are_shared():
    images, texts = random_unit(6, 4), random_unit(9, 4, seed=1)
    image_ids = torch.tensor([0, 1, 1, 2, 5, 3])
    text_image_ids = torch.tensor([0, 0, 1, 1, 2, 3, 3, 7, 2])
    result = diagnose(images, texts, text_image_ids, image_ids)
    similarity = texts @ images.T
    is_own = text_image_ids[:, None] == image_ids[None, :]
    assert result.own_similarity == pytest.approx(similarity[is_own].mean().item(), abs=1e-6)
    assert result.other_similarity == pytest.approx(similarity[~is_own].mean().item(), abs=1e-6)


def test_a_trained_model_has_no_fault():
    assert diagnose(*trained()).faults == ()
    assert diagnose(*trained(num_images=8, captions=1)).faults == ()


def test_random_towers_are_reported():
    (fault,) = diagnose(random_unit(50, 16), random_unit(100, 16, seed=1), torch.arange(50).repeat(2)).faults
    assert "not significantly closer to their own image" in fault


def test_a_collapse_is_reported():
    images, texts, ids = trained()
    point = unit([[1.0] * 16])
    collapsed = torch.nn.functional.normalize(point + 0.01 * images, dim=-1)
    (fault,) = diagnose(collapsed, texts, ids).faults
    assert "all images have nearly the same embedding" in fault
    line = unit([[1.0 if number % 2 else -1.0, 0.001 * number, *[0.0] * 14] for number in range(100)])
    (fault,) = diagnose(images, line, ids).faults
    assert "captions differ in little more than one dimension" in fault


def test_a_diverged_model_is_reported():
    images, texts, ids = trained()
    (fault,) = diagnose(images * torch.nan, texts, ids).faults
    assert "NaN" in fault


def test_a_set_without_pairs_still_has_figures_of_each_modality():
    result = diagnose(random_unit(5, 4), random_unit(5, 4, seed=1), torch.arange(5) + 100)
    assert math.isnan(result.own_similarity)
    assert not math.isnan(result.image_uniformity)


def test_truncated_vectors_have_length_1():
    embeds = torch.tensor([[3.0, 4.0, 12.0]]) / 13
    torch.testing.assert_close(truncate(embeds, 2), torch.tensor([[0.6, 0.8]]))
    torch.testing.assert_close(truncate(embeds, 3), embeds)


def test_int8_has_255_steps():
    embeds = torch.tensor([[1.0, 0.0], [0.6, -0.8]])
    assert quantize(embeds, "int8").tolist() == [[127, 0], [76, -102]]


def test_binary_counts_bits_that_agree():
    embeds = torch.tensor([[0.1, -0.2, 0.3, -0.9], [0.1, 0.2, 0.3, -0.1]])
    one, other = quantize(embeds, "binary")
    assert (one @ other).item() == 3 - 1


def test_float32_is_left_alone():
    embeds = torch.randn(3, 4)
    assert quantize(embeds, "float32") is embeds


def test_other_precisions_are_refused():
    with pytest.raises(ValueError, match=f"precision='int4'.*{', '.join(PRECISIONS)}"):
        quantize(torch.eye(2), "int4")
