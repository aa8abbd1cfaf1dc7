import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_clipmini import infonce_loss, sigmoid_loss
from modeling_clipmini.loss_clipmini import (
    affinity_rows,
    hard_negative_weights,
    infonce_rows,
    pairwise_logits,
    positive_pairs,
    sigmoid_rows,
)

# Three pairs in the plane. Similarities: S[i][j] = <image i, text j>.
IMAGES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
TEXTS = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
SIMILARITIES = [[0.8, 0.0, 1.0], [0.6, 1.0, 0.0], [0.96, 0.8, 0.6]]
SCALE = torch.tensor(2.0)
SHARED_IDS = torch.tensor([7, 3, 7])  # images 0 and 2 are one image


def log_softmax(row, column):
    return row[column] - math.log(sum(math.exp(value) for value in row))


def by_hand_infonce(positives):
    """The docstring's formula, one term at a time."""
    logits = [[2.0 * value for value in row] for row in SIMILARITIES]
    columns = [list(column) for column in zip(*logits, strict=True)]
    images = [sum(log_softmax(logits[i], p) for p in positives[i]) / len(positives[i]) for i in range(3)]
    texts = [sum(log_softmax(columns[i], p) for p in positives[i]) / len(positives[i]) for i in range(3)]
    return -(sum(images) / 3 + sum(texts) / 3) / 2


def by_hand_sigmoid(positives, bias):
    total = 0.0
    for i in range(3):
        for j in range(3):
            sign = 1 if j in positives[i] else -1
            total -= math.log(1 / (1 + math.exp(-sign * (2.0 * SIMILARITIES[i][j] + bias))))
    return total / 3


def test_logits_are_the_scaled_similarities():
    assert torch.allclose(pairwise_logits(IMAGES, TEXTS, SCALE), 2 * torch.tensor(SIMILARITIES))


@pytest.mark.parametrize(
    ("ids", "positives"),
    [
        (None, [[0], [1], [2]]),
        (torch.tensor([4, 9, 2]), [[0], [1], [2]]),
        (SHARED_IDS, [[0, 2], [1], [0, 2]]),
        (torch.tensor([5, 5, 5]), [[0, 1, 2]] * 3),
    ],
)
def test_losses_equal_the_sums_by_hand(ids, positives):
    assert infonce_loss(IMAGES, TEXTS, SCALE, ids).item() == pytest.approx(by_hand_infonce(positives), abs=1e-6)
    bias = torch.tensor(-1.5)
    assert sigmoid_loss(IMAGES, TEXTS, SCALE, bias, ids).item() == pytest.approx(
        by_hand_sigmoid(positives, -1.5), abs=1e-6
    )


def test_infonce_without_shared_ids_is_clips_loss():
    logits = 2 * IMAGES @ TEXTS.T
    labels = torch.arange(3)
    cross_entropy = torch.nn.functional.cross_entropy
    clip_loss = (cross_entropy(logits, labels) + cross_entropy(logits.T, labels)) / 2
    assert torch.allclose(infonce_loss(IMAGES, TEXTS, SCALE), clip_loss)


def test_a_second_caption_of_one_image_is_not_punished():
    """Perfect embeddings of one image with two captions: only ids let the loss reach its least value."""
    images = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    scale = torch.tensor(100.0)
    with_ids = infonce_loss(images, images, scale, torch.tensor([1, 1, 2])).item()
    assert with_ids == pytest.approx(2 / 3 * math.log(2), abs=1e-5)  # the mean of log |P(i)|
    sigmoid_with_ids = sigmoid_loss(images, images, scale, torch.tensor(-50.0), torch.tensor([1, 1, 2])).item()
    assert sigmoid_with_ids < 1e-6 < sigmoid_loss(images, images, scale, torch.tensor(-50.0)).item()


def test_ids_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match=r"shape \(2,\); one id per pair is needed: \(3,\)"):
        infonce_loss(IMAGES, TEXTS, SCALE, torch.tensor([1, 2]))


def test_logits_are_float32_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        logits = pairwise_logits(IMAGES.bfloat16(), TEXTS.bfloat16(), SCALE)
    assert logits.dtype == torch.float32


def test_positives_share_an_id():
    positives = positive_pairs(SHARED_IDS, torch.tensor([3, 7]))
    assert positives.tolist() == [[False, True], [True, False], [False, True]]


def test_label_smoothing_spreads_a_share_of_the_target_evenly():
    rows = infonce_rows(IMAGES, TEXTS, SCALE, SHARED_IDS, SHARED_IDS, label_smoothing=0.3)
    logits = [[2.0 * value for value in row] for row in SIMILARITIES]
    targets = [[0.45, 0.1, 0.45], [0.1, 0.8, 0.1], [0.45, 0.1, 0.45]]  # 0.7 on the positives, 0.1 on everything
    by_hand = [
        -sum(t * log_softmax(row, j) for j, t in enumerate(target))
        for row, target in zip(logits, targets, strict=True)
    ]
    assert rows.tolist() == pytest.approx(by_hand, abs=1e-6)


def test_hard_negatives_weigh_more_and_weights_have_mean_one():
    logits = torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.5, 0.5]])
    positives = torch.tensor([[True, False, False], [False, True, False]])
    weights = hard_negative_weights(logits, positives, 1.0).exp()
    share = math.exp(2) / (math.exp(2) + 1)
    assert weights[0].tolist() == pytest.approx([1.0, 2 * share, 2 * (1 - share)])
    assert weights[1].tolist() == pytest.approx([1.0, 1.0, 1.0])
    everything = torch.ones(2, 3, dtype=torch.bool)
    assert hard_negative_weights(logits, everything, 1.0).tolist() == [[0.0] * 3] * 2


def test_hard_negatives_enter_both_losses_as_the_formula_says():
    ids = torch.arange(3)
    bias = torch.tensor(-1.0)
    infonce = infonce_rows(IMAGES, TEXTS, SCALE, ids, ids, hardness=0.5)
    sigmoid = sigmoid_rows(IMAGES, TEXTS, SCALE, bias, ids, ids, hardness=0.5)
    for i in range(3):
        logits = [2.0 * value for value in SIMILARITIES[i]]
        others = [j for j in range(3) if j != i]
        total = sum(math.exp(0.5 * logits[j]) for j in others)
        weight = {j: 2 * math.exp(0.5 * logits[j]) / total for j in others}
        denominator = math.exp(logits[i]) + sum(weight[j] * math.exp(logits[j]) for j in others)
        assert infonce[i].item() == pytest.approx(math.log(denominator) - logits[i], abs=1e-6)
        negatives = sum(weight[j] * math.log(1 + math.exp(logits[j] - 1)) for j in others)
        assert sigmoid[i].item() == pytest.approx(math.log(1 + math.exp(1 - logits[i])) + negatives, abs=1e-6)


def test_no_gradient_flows_through_the_weights_of_hard_negatives():
    """They are constants: the gradient is that of the same sum with the weights as given numbers."""
    images, ids, bias = IMAGES.clone().requires_grad_(), torch.arange(3), torch.tensor(-1.0)
    logits = 2 * images @ TEXTS.T
    log_weights = hard_negative_weights(logits.detach(), torch.eye(3, dtype=torch.bool), 0.5)
    signs = 2 * torch.eye(3) - 1
    infonce = torch.nn.functional.cross_entropy(logits + log_weights, ids, reduction="sum")
    sigmoid = -(log_weights.exp() * torch.nn.functional.logsigmoid(signs * (logits + bias))).sum()
    for rows, by_hand in (
        (infonce_rows(images, TEXTS, SCALE, ids, ids, hardness=0.5), infonce),
        (sigmoid_rows(images, TEXTS, SCALE, bias, ids, ids, hardness=0.5), sigmoid),
    ):
        [found], [expected] = (torch.autograd.grad(loss, images, retain_graph=True) for loss in (rows.sum(), by_hand))
        assert expected.abs().max() > 0.1
        assert torch.allclose(found, expected, atol=1e-6)


def test_affinity_is_zero_for_a_perfect_copy_and_the_divergence_otherwise():
    assert affinity_rows(IMAGES, TEXTS, SCALE, IMAGES, TEXTS, 2.0).abs().max() < 1e-6
    turned = IMAGES[[1, 2, 0]]
    rows = affinity_rows(IMAGES, TEXTS, SCALE, turned, TEXTS, 5.0)
    teacher = (5.0 * turned @ TEXTS.T).softmax(dim=1)
    student = (2.0 * IMAGES @ TEXTS.T).log_softmax(dim=1)
    assert torch.allclose(rows, (teacher * (teacher.log() - student)).sum(dim=1), atol=1e-6)
    assert rows.min() > 0


@settings(max_examples=30, deadline=None)
@given(ids=st.lists(st.integers(0, 3), min_size=2, max_size=6), seed=st.integers(0, 1000))
def test_losses_do_not_depend_on_the_order_of_pairs(ids, seed):
    generator = torch.Generator().manual_seed(seed)
    images, texts = torch.nn.functional.normalize(torch.randn(2, len(ids), 4, generator=generator), dim=-1)
    order = torch.randperm(len(ids), generator=generator)
    ids = torch.tensor(ids)
    for loss in (
        lambda i, t, k: infonce_loss(i, t, SCALE, k),
        lambda i, t, k: sigmoid_loss(i, t, SCALE, torch.tensor(-3.0), k),
    ):
        assert torch.allclose(loss(images, texts, ids), loss(images[order], texts[order], ids[order]), atol=1e-5)
