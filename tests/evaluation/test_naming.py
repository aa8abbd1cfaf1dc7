import math

import pytest

from clipmini.evaluation.intervals import Interval
from clipmini.evaluation.naming import eval_results, format_figure, format_interval
from clipmini.names import hub_id, public_name


@pytest.mark.parametrize(
    ("name", "expected_id", "expected_name"),
    [
        ("org/pairs", "org/pairs", "org/pairs"),
        ("/home/me/pairs", None, "pairs"),
        ("../data/pairs.csv", None, "pairs.csv"),
        ("a/b/c", None, "c"),
        ("pairs", None, "pairs"),
        ("C:\\Users\\me\\pairs", None, "pairs"),
        ("/", None, "data"),
    ],
)
def test_hub_ids_are_told_from_local_paths(name, expected_id, expected_name):
    assert (hub_id(name), public_name(name)) == (expected_id, expected_name)


def test_an_existing_path_is_no_hub_id(tmp_path, monkeypatch):
    (tmp_path / "org" / "pairs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/pairs") is None
    assert public_name("org/pairs") == "pairs"
    assert public_name(".") == tmp_path.name


def test_metrics_are_formatted_for_people():
    assert format_figure("text_to_image_r1", 0.31249) == "31.2"
    assert format_figure("text_to_image_mean_rank", 1234.56) == "1,234.6"
    assert format_figure("mean_recall", math.nan) == "-"
    assert format_interval("mean_recall", Interval(0.3, 0.25, 0.4)) == "25.0 to 40.0"
    assert format_interval("text_to_image_median_rank", Interval(2.0)) == ""


def test_model_card_metadata_hold_finite_metrics_with_their_intervals():
    metrics = {
        "text_to_image_r1": Interval(0.3, 0.25, 0.4),
        "mean_recall": Interval(math.nan),
        "text_to_image_median_rank": Interval(2.0),
    }
    result, median = eval_results("image-text-retrieval", {"source": "org/pairs", "split": "test"}, metrics)
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("org/pairs", "org/pairs", "test")
    assert (result.metric_type, result.metric_name, result.metric_value) == (
        "text_to_image_r1",
        "text to image R@1",
        0.3,
    )
    assert result.metric_args == {"interval_95": [0.25, 0.4]}
    assert (median.metric_value, median.metric_args) == (2, None)
