from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clipmini.training.batches import PairSampler, draw_index


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


def test_each_image_comes_up_once_an_epoch_in_a_new_order():
    sampler = PairSampler(range(50), [5] * 50, seed=3)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == [(row, 0) for row in range(50)]
    assert sorted(second) == [(row, 1) for row in range(50)]
    assert [row for row, _ in first] != [row for row, _ in second]
    assert epoch(PairSampler(range(50), [5] * 50, seed=3), 1) == second
    assert epoch(PairSampler(range(50), [5] * 50, seed=4), 1) != second


def test_several_captions_an_epoch_as_far_as_there_are():
    sampler = PairSampler([7, 8, 9], [5, 1, 2], captions_per_epoch=3)
    assert len(sampler) == 6
    assert sorted(epoch(sampler, 1)) == [(0, 3), (0, 4), (0, 5), (1, 1), (2, 2), (2, 3)]


def test_captions_are_covered_evenly():
    drawn = [draw_index(5, turn, 0, 17) for turn in range(35)]
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 35, 5))
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15]


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 4)), min_size=3, max_size=25),
    block=st.integers(1, 6),
    captions=st.integers(1, 3),
)
def test_no_block_holds_two_captions_of_one_image(counts, block, captions):
    image_ids = [image_id for image_id, _ in counts]
    if len(set(image_ids)) < block:
        with pytest.raises(ValueError, match="unique_images_in_batch"):
            PairSampler(image_ids, [n for _, n in counts], captions_per_epoch=captions, unique_within=block)
        return
    sampler = PairSampler(image_ids, [n for _, n in counts], captions_per_epoch=captions, unique_within=block)
    for number in range(3):
        pairs = epoch(sampler, number)
        assert len(pairs) == len(sampler) == len(set(pairs)) > 0
        for start in range(0, len(pairs), block):
            ids = [image_ids[row] for row, _ in pairs[start : start + block]]
            assert len(ids) == len(set(ids)) == block


def test_as_few_pairs_as_possible_are_left_out_and_not_always_the_same():
    sampler = PairSampler(range(10), [3] * 10, captions_per_epoch=3, unique_within=7)
    assert len(sampler) == 28  # of 30
    left_out = Counter()
    for number in range(40):
        left_out.update(set(range(30)) - {3 * row + turn - 3 * number for row, turn in epoch(sampler, number)})
    assert len(left_out) > 20


def test_one_image_with_many_captions_cannot_fill_every_block():
    ids = np.array([0, 1, 2])
    sampler = PairSampler(ids, [100, 2, 2], captions_per_epoch=100, unique_within=2)
    assert len(sampler) == 8  # four blocks, each with image 0 and one other caption
