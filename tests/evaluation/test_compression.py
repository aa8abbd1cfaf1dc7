import pytest
import torch

from clipmini.evaluation.diagnostics import PRECISIONS, quantize, truncate


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
