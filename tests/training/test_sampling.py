from clipmini.training.batches import PairSampler, draw_index


def epoch(sampler, number):
    sampler.set_epoch(number)
    return list(sampler)


def test_each_image_comes_up_once_an_epoch_in_a_new_order():
    sampler = PairSampler(50, seed=3)
    first, second = epoch(sampler, 0), epoch(sampler, 1)
    assert sorted(first) == [(row, 0) for row in range(50)]
    assert sorted(second) == [(row, 1) for row in range(50)]
    assert [row for row, _ in first] != [row for row, _ in second]
    assert epoch(PairSampler(50, seed=3), 1) == second
    assert epoch(PairSampler(50, seed=4), 1) != second


def test_captions_are_covered_evenly():
    drawn = [draw_index(5, epoch, 0, 17) for epoch in range(35)]
    assert all(sorted(drawn[start : start + 5]) == [0, 1, 2, 3, 4] for start in range(0, 35, 5))
    assert drawn[:5] != drawn[5:10] or drawn[5:10] != drawn[10:15]
