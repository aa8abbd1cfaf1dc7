"""Classifiers on frozen image embeddings: a linear probe and nearest neighbors.

Shape letters: N training and M test images, C classes, D the width of the embeddings.
"""

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, StratifiedKFold
from torch import Tensor

from .classification import ClassificationMetrics, classification_metrics

PENALTIES = tuple(10.0**power for power in range(-3, 5))  # inverse strengths of the L2 penalty to try
NUM_FOLDS = 5
NUM_NEIGHBORS = 20
NEIGHBOR_TEMPERATURE = 0.07  # of the votes, as in Wu et al., 2018, arXiv:1805.01978
BLOCK = 1024  # test images compared at once


@dataclass(frozen=True)
class ProbeResult:
    """Metrics of two simple classifiers on frozen embeddings.

    Attributes:
        linear: logistic regression, its L2 penalty chosen by cross-validation on the training images alone (Radford
            et al., 2021, appendix A.3).
        inverse_penalty: the inverse strength that was chosen.
        num_folds: folds of the cross-validation.
        neighbors: a vote of the nearest training images, weighted by exp(cosine / 0.07).
        num_neighbors: number of training images that vote.
    """

    linear: ClassificationMetrics
    inverse_penalty: float
    num_folds: int
    neighbors: ClassificationMetrics
    num_neighbors: int


def probe(
    train_embeds: Tensor, train_labels: Tensor, test_embeds: Tensor, test_labels: Tensor, num_classes: int
) -> ProbeResult:
    """Fit both classifiers on training images and measure them on test images.

    Args:
        train_embeds: (N, D), of length 1.
        train_labels: (N,) integers from 0 to C - 1.
        test_embeds: (M, D), of length 1.
        test_labels: (M,) likewise.
        num_classes: C.

    Raises:
        ValueError: there are too few training images, or an embedding is not finite.
    """
    counts = torch.bincount(train_labels, minlength=num_classes)
    num_present, largest = int((counts > 0).sum()), int(counts.max())
    if num_present < 2 or largest < 2:
        raise ValueError(
            f"A probe needs training images of at least two classes, and two of one of them; there are "
            f"{len(train_labels)} of {num_present}."
        )
    if not (train_embeds.isfinite().all() and test_embeds.isfinite().all()):
        raise ValueError("Embeddings hold NaN or infinity: training diverged, or the weights are damaged.")
    num_folds = min(NUM_FOLDS, largest)
    folds = StratifiedKFold(num_folds, shuffle=True, random_state=0)
    search = GridSearchCV(LogisticRegression(max_iter=1000), {"C": PENALTIES}, cv=folds, error_score="raise")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The least populated class")  # only some folds hold it
        try:
            search.fit(train_embeds.numpy(), train_labels.numpy())
        except ValueError as error:  # a fold that leaves one class
            raise ValueError(
                f"The penalty cannot be chosen by cross-validation: {error} Give every class two training images."
            ) from error
    # Logarithms, since some probabilities of many classes are too small for float32, and would tie.
    scores = np.full((len(test_embeds), num_classes), -np.inf, dtype=np.float32)
    scores[:, search.classes_] = search.predict_log_proba(test_embeds.numpy())
    num_neighbors = min(NUM_NEIGHBORS, len(train_embeds))
    votes = neighbor_votes(train_embeds, train_labels, test_embeds, num_classes, num_neighbors)
    return ProbeResult(
        linear=classification_metrics(
            torch.from_numpy(scores), test_labels, confidence=torch.from_numpy(np.exp(scores.max(axis=1)))
        ),
        inverse_penalty=search.best_params_["C"],
        num_folds=num_folds,
        neighbors=classification_metrics(votes, test_labels, confidence=votes.amax(dim=1)),
        num_neighbors=num_neighbors,
    )


def neighbor_votes(
    train_embeds: Tensor, train_labels: Tensor, test_embeds: Tensor, num_classes: int, num_neighbors: int
) -> Tensor:
    """Return the (M, C) shares of votes, those of each test image's nearest `num_neighbors` training images."""
    votes = torch.zeros(len(test_embeds), num_classes)
    for start in range(0, len(test_embeds), BLOCK):
        rows = slice(start, start + BLOCK)
        nearest = (test_embeds[rows] @ train_embeds.T).topk(num_neighbors, dim=1)
        weights = (nearest.values / NEIGHBOR_TEMPERATURE).softmax(dim=1)
        votes[rows] = votes[rows].scatter_add(1, train_labels[nearest.indices], weights)
    return votes
