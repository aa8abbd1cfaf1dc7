import math

import pytest

from clipmini.evaluation.intervals import Interval
from clipmini.evaluation.naming import eval_results, format_figure, format_interval, hub_id, public_name


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
def test_what_is_of_the_hub_and_what_is_of_this_machine(name, expected_id, expected_name):
    assert (hub_id(name), public_name(name)) == (expected_id, expected_name)


def test_what_lies_here_is_none_of_the_hubs(tmp_path, monkeypatch):
    (tmp_path / "org" / "pairs").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert hub_id("org/pairs") is None
    assert public_name("org/pairs") == "pairs"
    assert public_name(".") == tmp_path.name


def test_figures_are_written_as_people_read_them():
    assert format_figure("text_to_image_r1", 0.31249) == "31.2"
    assert format_figure("text_to_image_mean_rank", 1234.56) == "1,234.6"
    assert format_figure("mean_recall", math.nan) == "-"
    assert format_interval("mean_recall", Interval(0.3, 0.25, 0.4)) == "25.0 to 40.0"


def test_the_hub_gets_shares_with_intervals_and_nothing_that_is_not_finite():
    metrics = {"text_to_image_r1": Interval(0.3, 0.25, 0.4), "mean_recall": Interval(*[math.nan] * 3)}
    (result,) = eval_results("image-text-retrieval", {"source": "org/pairs", "split": "test"}, metrics)
    assert (result.dataset_type, result.dataset_name, result.dataset_split) == ("org/pairs", "org/pairs", "test")
    assert (result.metric_type, result.metric_name, result.metric_value) == (
        "text_to_image_r1",
        "text to image R@1",
        0.3,
    )
    assert result.metric_args == {"interval_95": [0.25, 0.4]}
