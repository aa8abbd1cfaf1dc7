import pytest
import torch
from torch.nn.functional import normalize

from clipmini.evaluation.probe import neighbor_votes, probe


def clusters(count, num_classes=3, noise=0.1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % num_classes
    return normalize(torch.eye(8)[labels] + noise * torch.randn(count, 8, generator=generator), dim=-1), labels


def test_votes_by_hand():
    train = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    votes = neighbor_votes(train, torch.tensor([2, 0, 1]), torch.tensor([[1.0, 0.0]]), 4, 2)
    weights = torch.tensor([0.6, 1.0]).div(0.07).softmax(dim=0)
    torch.testing.assert_close(votes, torch.tensor([[weights[0], 0, weights[1], 0]]))


def test_clusters_are_separated():
    result = probe(*clusters(60), *clusters(30, seed=1), 3)
    assert result.linear.shares["top1"].value == result.neighbors.shares["top1"].value == 1
    assert result.num_neighbors == 20


def test_random_labels_are_learned_no_better_than_chance():
    accuracies = []
    for seed in range(5):
        embeds, labels = clusters(150, noise=0.5)
        labels = labels[torch.randperm(150, generator=torch.Generator().manual_seed(seed))]
        accuracies.append(probe(embeds, labels, *clusters(150, noise=0.5, seed=1), 3).linear.shares["top1"].value)
    assert sum(accuracies) / 5 == pytest.approx(1 / 3, abs=0.15)


@pytest.mark.parametrize("missing", [0, 1, 3])
def test_a_class_without_training_images_is_never_predicted_and_the_others_are_found(missing):
    train, labels = clusters(80, num_classes=4)
    is_kept = labels != missing
    result = probe(train[is_kept], labels[is_kept], *clusters(40, num_classes=4, seed=1), 4)
    for metrics in (result.linear, result.neighbors):
        assert metrics.confusion.sum(axis=0)[missing] == 0
        assert metrics.per_class.tolist() == [float(label != missing) for label in range(4)]


def test_too_few_images_are_refused():
    with pytest.raises(ValueError, match="there are 3 of 3"):
        probe(*clusters(3), *clusters(3), 3)
    with pytest.raises(ValueError, match="at least two classes"):
        probe(*clusters(9, num_classes=1), *clusters(3, num_classes=1), 3)


def test_a_fold_of_one_class_is_refused_with_the_remedy():
    embeds, labels = clusters(6, num_classes=2)
    labels[:] = torch.tensor([0, 0, 0, 0, 0, 1])
    with pytest.raises(ValueError, match=r"cross-validation.* Give every class two training images"):
        probe(embeds, labels, embeds, labels, 2)


def test_a_class_with_one_image_does_not_stop_the_others():
    embeds, labels = clusters(31)
    labels[30] = 3
    assert probe(embeds, labels, *clusters(30, seed=1), 4).linear.shares["top1"].value == 1


def test_a_diverged_model_is_reported():
    embeds, labels = clusters(30)
    with pytest.raises(ValueError, match="NaN"):
        probe(embeds * torch.nan, labels, embeds, labels, 3)
