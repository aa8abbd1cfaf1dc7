import math

import numpy as np
import pytest
import torch

from clipmini.evaluation import intervals
from clipmini.evaluation.intervals import bootstrap_intervals, interval_ends, paired_bootstrap, percentiles
from clipmini.evaluation.retrieval import METRIC_NAMES, QueryScores, retrieval_scores, summarize_scores


def scores_of(text_ranks, image_ranks, captions=1):
    """Scores of images that have `captions` captions each."""
    return {
        "text_to_image": QueryScores(
            torch.tensor(text_ranks),
            1 / (torch.tensor(text_ranks) + 1),
            torch.arange(len(image_ranks)).repeat_interleave(captions),
        ),
        "image_to_text": QueryScores(
            torch.tensor(image_ranks), 1 / (torch.tensor(image_ranks) + 1), torch.arange(len(image_ranks))
        ),
    }


def random_scores(num_images, captions, seed=0):
    random = torch.Generator().manual_seed(seed)
    images, texts = (
        torch.nn.functional.normalize(torch.randn(count, 4, generator=random), dim=-1)
        for count in (num_images, num_images * captions)
    )
    return retrieval_scores(images, texts, torch.arange(num_images).repeat_interleave(captions))


def test_every_metric_but_the_median_ranks_has_an_interval_around_it():
    scores = random_scores(40, 3)
    result = bootstrap_intervals(scores)
    values = summarize_scores(scores)
    assert list(result) == list(METRIC_NAMES)
    for name, interval in result.items():
        assert interval.value == values[name]
        if name.endswith("_median_rank"):
            assert math.isnan(interval.low)
        else:
            assert interval.low <= interval.value <= interval.high
    assert set(METRIC_NAMES) - set(interval_ends(result)) == {f"{name}_median_rank" for name in scores}
    assert result["mean_recall"].low < result["mean_recall"].high


def test_a_metric_that_does_not_vary_has_a_point_for_an_interval():
    result = bootstrap_intervals(scores_of([0] * 10, [0] * 10))
    assert set(map(tuple, interval_ends(result).values())) == {(1.0, 1.0)}


def test_half_of_400_is_known_to_five_points():
    # A binomial share of 1/2 of 400 has a standard error of 2.5 points: the interval is 4.9 to either side.
    interval = bootstrap_intervals(scores_of([0, 9] * 200, [0, 9] * 200), 4000)["image_to_text_r1"]
    assert (interval.low, interval.high) == pytest.approx((0.451, 0.549), abs=0.003)


def test_a_fortieth_of_the_resamples_lies_outside_on_either_side():
    assert percentiles(np.random.default_rng(0).permutation(41)) == pytest.approx((1, 39))


def test_captions_that_succeed_together_do_not_narrow_the_interval():
    one = bootstrap_intervals(scores_of([0, 9] * 50, [0, 9] * 50))
    five = bootstrap_intervals(scores_of(np.repeat([0, 9] * 50, 5).tolist(), [0, 9] * 50, captions=5))
    assert vars(five["text_to_image_r1"]) == pytest.approx(vars(one["text_to_image_r1"]))


def test_each_resample_is_summarized_as_the_whole_is(monkeypatch):
    scores = random_scores(12, 2)
    weights = np.array([[1] * 12, [2] + [0] * 3 + [1] * 6 + [3, 1], [0] * 6 + [2] * 6, [12] + [0] * 11])
    monkeypatch.setattr(intervals, "resample_weights", lambda *_: iter([weights[:3], weights[3:]]))
    drawn = intervals._resample(scores, 4, 0, (1, 5, 10))
    for row, weight in enumerate(weights):
        repeated = {
            direction: QueryScores(
                *(
                    value.repeat_interleave(torch.from_numpy(weight)[score.ids])
                    for value in (score.ranks, score.average_precision, score.ids)
                )
            )
            for direction, score in scores.items()
        }
        expected = summarize_scores(repeated)
        assert {name: values[row] for name, values in drawn.items()} == pytest.approx(
            {name: expected[name] for name in drawn}
        )


def test_memory_is_bounded_by_drawing_a_few_at_a_time(monkeypatch):
    scores = random_scores(20, 2)
    whole = bootstrap_intervals(scores, 50)
    monkeypatch.setattr(intervals, "MAX_WEIGHTS", 7 * 20)
    assert interval_ends(bootstrap_intervals(scores, 50)) == interval_ends(whole)


def test_ids_need_not_be_rows():
    scores = random_scores(20, 2)
    shifted = {name: QueryScores(one.ranks, one.average_precision, one.ids * 7 + 3) for name, one in scores.items()}
    assert interval_ends(bootstrap_intervals(shifted)) == interval_ends(bootstrap_intervals(scores))


def test_a_model_does_not_differ_from_itself():
    scores = random_scores(30, 2)
    for name, difference in paired_bootstrap(scores, scores).items():
        assert difference.value == 0
        if not name.endswith("_median_rank"):
            assert (difference.low, difference.high, difference.p_value) == (0, 0, 1)


def test_a_small_difference_is_significant_where_the_same_images_are_hard_for_both():
    # Ranks vary by a thousand between images, and by one between models.
    ranks = [100 * number for number in range(50)]
    better, worse = scores_of(ranks, ranks), scores_of([rank + 1 for rank in ranks], ranks)
    difference = paired_bootstrap(better, worse)["text_to_image_mean_rank"]
    assert (difference.value, difference.low, difference.high) == pytest.approx((-1, -1, -1))
    assert difference.p_value == pytest.approx(2 / 1001)
    assert paired_bootstrap(worse, better)["text_to_image_mean_rank"].value == 1


def test_random_models_rarely_differ():
    p_values = [
        paired_bootstrap(random_scores(60, 2, seed), random_scores(60, 2, seed + 100), 200)["mean_recall"].p_value
        for seed in range(30)
    ]
    assert sum(p_value < 0.05 for p_value in p_values) <= 4  # 1.5 are to be expected


def test_other_queries_cannot_be_paired():
    with pytest.raises(ValueError, match="have 20 and 18 queries text to image"):
        paired_bootstrap(random_scores(10, 2), random_scores(9, 2))


def test_a_set_without_queries_has_no_interval():
    scores = retrieval_scores(torch.eye(2), torch.eye(2), torch.tensor([5, 6]))
    assert all(math.isnan(interval.low) for interval in bootstrap_intervals(scores, 5).values())


def test_a_set_without_queries_shows_no_difference():
    scores = retrieval_scores(torch.eye(2), torch.eye(2), torch.tensor([5, 6]))
    assert all(math.isnan(difference.p_value) for difference in paired_bootstrap(scores, scores, 5).values())
