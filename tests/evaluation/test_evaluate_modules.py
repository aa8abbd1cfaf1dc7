"""The `evaluate` modules, loaded by path and offline."""

import evaluate
import pytest
import torch

import clipmini
from clipmini.evaluation.retrieval import retrieval_metrics


@pytest.fixture(autouse=True, scope="module")
def offline(tmp_path_factory):
    # One cache for all tests: modules imported from the first are looked up there again.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluate.config, "HF_EVALUATE_OFFLINE", True)
        patch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(evaluate.config, "HF_METRICS_CACHE", str(tmp_path_factory.mktemp("metrics")))
        yield


def test_retrieval_by_hand():
    metric = evaluate.load(clipmini.metric("image_text_retrieval"))
    result = metric.compute(image_embeds=[[2.0, 0.0], [0.0, 1.0]], text_embeds=[[[1.0, 0.1]], [[0.9, 0.2], [0, 3]]])
    assert result["text_to_image_r1"] == pytest.approx(2 / 3)
    assert result["image_to_text_r1"] == 1
    assert "intervals" not in result


def test_retrieval_agrees_with_the_trainer():
    metric = evaluate.load(clipmini.metric("image_text_retrieval"))
    images, texts = torch.randn(30, 8), torch.randn(30, 2, 8)
    for start in range(0, 30, 10):
        rows = slice(start, start + 10)
        metric.add_batch(image_embeds=images[rows].tolist(), text_embeds=texts[rows].tolist())
    result = metric.compute(intervals=True, num_resamples=50)
    unit = [torch.nn.functional.normalize(embeds, dim=-1) for embeds in (images, texts.flatten(0, 1))]
    expected = retrieval_metrics(*unit, torch.arange(30).repeat_interleave(2))
    low, high = result.pop("intervals")["mean_recall"]
    assert low <= result["mean_recall"] <= high
    assert result == pytest.approx(expected)


def test_accuracy_by_hand():
    metric = evaluate.load(clipmini.metric("zero_shot_accuracy"))
    result = metric.compute(
        predictions=[[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]], references=[0, 1, 1], are_probabilities=True, intervals=True
    )
    assert result["top1"] == pytest.approx(2 / 3)
    assert result["mean_per_class"] == pytest.approx(3 / 4)
    assert result["calibration_error"] == pytest.approx((0.1 + 0.6 + 0.2) / 3)
    assert set(result["intervals"]) == {"top1", "mean_per_class"}


@pytest.mark.parametrize("name", ["image_text_retrieval", "zero_shot_accuracy"])
def test_modules_describe_themselves(name):
    metric = evaluate.load(clipmini.metric(name))
    assert metric.citation
    assert metric.features
    assert ">>>" in metric.inputs_description


def test_an_unknown_metric_is_refused():
    with pytest.raises(ValueError, match="no metric 'recall'; use one of image_text_retrieval, zero_shot_accuracy"):
        clipmini.metric("recall")
