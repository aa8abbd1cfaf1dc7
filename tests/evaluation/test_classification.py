import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, confusion_matrix, top_k_accuracy_score

from clipmini.evaluation.classification import classification_metrics


def test_metrics_by_hand():
    # Images of classes 0, 0, 1, 2; the second is taken for class 2. No image of class 3.
    scores = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.3, 0.1, 0.5, 0.1], [0.2, 0.6, 0.1, 0.1], [0.2, 0.1, 0.4, 0.3]])
    result = classification_metrics(scores, torch.tensor([0, 0, 1, 2]), confidence=scores.amax(dim=1))
    assert result.chance == 0.25
    assert result.shares["top1"].value == 0.75
    assert "top5" not in result.shares
    assert result.per_class[:3].tolist() == [0.5, 1, 1]
    assert math.isnan(result.per_class[3])
    assert result.shares["mean_per_class"].value == pytest.approx(2.5 / 3)
    assert result.confusion.tolist() == [[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    # Each confidence (0.7, 0.5, 0.6, 0.4) is alone in its bin of a fifteenth.
    assert result.calibration_error == pytest.approx((0.3 + 0.5 + 0.4 + 0.6) / 4)


def test_calibration_is_measured_bin_by_bin():
    # Of ten images with confidence 0.8, eight are right: nothing is amiss.
    scores = torch.tensor([[0.8, 0.2]] * 10)
    labels = torch.tensor([0] * 8 + [1] * 2)
    result = classification_metrics(scores, labels, confidence=scores.amax(dim=1))
    assert result.calibration_error == pytest.approx(0, abs=1e-6)
    assert classification_metrics(scores, labels).calibration_error is None


@pytest.mark.parametrize("value", [0.5, torch.nan], ids=["collapsed", "diverged"])
def test_a_broken_model_does_not_look_good(value):
    result = classification_metrics(torch.full((20, 3), value), torch.arange(20) % 3)
    assert result.shares["top1"].value == 0
    assert np.trace(result.confusion) == 0
    assert result.confusion.sum() == 20


def test_one_class_is_always_found():
    result = classification_metrics(torch.ones(3, 1), torch.zeros(3, dtype=torch.long))
    assert result.shares["top1"].value == 1
    assert result.confusion.tolist() == [[3]]


@settings(max_examples=30, deadline=None)
@given(num_images=st.integers(2, 40), num_classes=st.integers(2, 12), seed=st.integers(0, 10**6))
def test_metrics_agree_with_scikit_learn(num_images, num_classes, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(num_images, num_classes, generator=generator)
    labels = torch.randint(num_classes, (num_images,), generator=generator)
    result = classification_metrics(scores, labels, num_resamples=20)
    predicted, classes = scores.argmax(dim=1), range(num_classes)
    assert result.shares["top1"].value == pytest.approx((predicted == labels).float().mean().item())
    assert result.shares["mean_per_class"].value == pytest.approx(
        balanced_accuracy_score(labels, predicted) if len(labels.unique()) > 1 else result.shares["top1"].value
    )
    assert result.confusion.tolist() == confusion_matrix(labels, predicted, labels=classes).tolist()
    if num_classes > 5:
        expected = top_k_accuracy_score(labels, scores, k=5, labels=classes)
        assert result.shares["top5"].value == pytest.approx(expected)


def test_intervals_are_those_of_a_share():
    scores = torch.eye(2).repeat(200, 1)
    result = classification_metrics(scores, torch.zeros(400, dtype=torch.long), num_resamples=4000)
    assert (result.shares["top1"].low, result.shares["top1"].high) == pytest.approx((0.451, 0.549), abs=0.01)
    assert vars(result.shares["mean_per_class"]) == pytest.approx(vars(result.shares["top1"]))


def test_rare_classes_widen_the_interval_of_the_mean_over_classes():
    # 90 images of class 0, 10 of class 1, half of each right.
    labels = torch.tensor([0] * 90 + [1] * 10)
    scores = torch.eye(2).repeat(50, 1)
    result = classification_metrics(scores, labels)
    assert result.shares["top1"].value == result.shares["mean_per_class"].value == 0.5
    assert (
        result.shares["mean_per_class"].high - result.shares["mean_per_class"].low
        > result.shares["top1"].high - result.shares["top1"].low
    )


@pytest.mark.parametrize(
    ("scores", "labels", "message"),
    [
        (torch.ones(2, 3), torch.tensor([0]), "1 labels do not match"),
        (torch.ones(0, 3), torch.tensor([], dtype=torch.long), "0 labels"),
        (torch.ones(2, 3), torch.tensor([0, 3]), "from 0 to 3 are not all among 3 classes"),
    ],
)
def test_scores_and_labels_that_do_not_match_are_refused(scores, labels, message):
    with pytest.raises(ValueError, match=message):
        classification_metrics(scores, labels)
