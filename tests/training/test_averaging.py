from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import TrainerControl, TrainerState

from clipmini.training.averaging import AVERAGE_FILE, WeightAverage


class Run:
    """A model whose weights a test sets by hand, averaged as `Trainer` would have it."""

    def __init__(self, model, decay=0.9, **args):
        self.model = model
        self.average = WeightAverage(model, decay)
        self.args = SimpleNamespace(**{"load_best_model_at_end": False, **args})
        self.state = TrainerState()

    def __call__(self, event):
        getattr(self.average, f"on_{event}")(self.args, self.state, TrainerControl(), model=self.model)

    def step(self, value):
        set_to(self.model, value)
        self("optimizer_step")


@torch.no_grad()
def set_to(model, value):
    for weight in model.parameters():
        if weight.requires_grad:
            weight.fill_(value)


def one_weight(value=0.0, **options):
    model = nn.Linear(1, 1, bias=False, **options)
    set_to(model, value)
    return model


def values_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_the_average_follows_its_formula():
    run = Run(one_weight(1.0), decay=0.15)
    run("train_begin")
    run.step(2.0)  # warm-up: d = 1/10
    assert run.average.averages["weight"].item() == pytest.approx(0.1 * 1 + 0.9 * 2)
    run.step(5.0)  # 2/11 is above 0.15 already
    assert run.average.averages["weight"].item() == pytest.approx(0.15 * 1.9 + 0.85 * 5)


def test_a_long_run_comes_to_the_full_decay():
    run = Run(one_weight(0.0), decay=0.5)
    run("train_begin")
    for _ in range(20):
        run.step(0.0)
    run.step(1.0)
    assert run.average.averages["weight"].item() == 0.5


def test_without_decay_the_average_is_the_last_weights():
    run = Run(one_weight(1.0), decay=0)
    run("train_begin")
    run.step(0.3)
    assert torch.equal(run.average.averages["weight"], run.model.weight)


@pytest.mark.parametrize("decay", [-0.1, 1, 1.5, float("nan")])
def test_a_decay_that_cannot_be_is_refused(decay):
    with pytest.raises(ValueError, match=rf"decay={decay} is not allowed; .* such as 0\.999"):
        WeightAverage(one_weight(), decay)


def test_it_is_applied_and_taken_back_bit_by_bit():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    model[0].requires_grad_(False)
    run = Run(model)
    run("train_begin")
    start = values_of(model)
    with torch.no_grad():
        for weight in model[2].parameters():
            weight.add_(torch.randn_like(weight) / 3)
    run("optimizer_step")
    before = values_of(model)
    with run.average.applied():
        inside = values_of(model)
        expected = 0.1 * start["2.weight"] + 0.9 * before["2.weight"]
        assert torch.allclose(inside["2.weight"], expected)
        assert not torch.equal(inside["2.weight"], before["2.weight"])
        assert torch.equal(inside["0.weight"], before["0.weight"])
        with run.average.applied():
            assert same(values_of(model), inside)
        assert same(values_of(model), inside)
    assert same(values_of(model), before)
    with pytest.raises(RuntimeError, match="evaluation"), run.average.applied():
        raise RuntimeError("evaluation")
    assert same(values_of(model), before)
    assert set(run.average.averages) == {"1.weight", "1.bias", "2.weight", "2.bias"}  # nothing for what is frozen


def test_before_and_after_training_the_model_is_left_alone():
    run = Run(one_weight(1.0))
    with run.average.applied():
        assert run.model.weight.item() == 1
    run("train_begin")
    run.step(2.0)
    run("train_end")
    assert run.model.weight.item() == pytest.approx(1.9)
    set_to(run.model, 7.0)
    with run.average.applied():
        assert run.model.weight.item() == 7


def test_small_steps_of_short_floats_are_not_lost():
    run = Run(one_weight(1.0, dtype=torch.bfloat16), decay=0.999)
    run("train_begin")
    run.average.num_updates = 100_000
    for _ in range(1000):
        run.step(2.0)
    assert run.average.averages["weight"].item() == pytest.approx(2 - 0.999**1000, rel=1e-4)
    with run.average.applied():
        assert run.model.weight.dtype == torch.bfloat16


def steps_of(run, seeds):
    for seed in seeds:
        torch.manual_seed(seed)
        with torch.no_grad():
            run.model.weight.copy_(torch.randn_like(run.model.weight))
        run("optimizer_step")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_average_is_the_same_to_the_bit(dtype, tmp_path):
    def new_run():
        torch.manual_seed(0)
        return Run(nn.Conv2d(3, 4, 2, bias=False, dtype=dtype).to(memory_format=torch.channels_last))

    whole = new_run()
    whole("train_begin")
    steps_of(whole, range(5))
    whole.average.save(tmp_path)
    steps_of(whole, range(5, 15))

    resumed = new_run()
    resumed.average.load(tmp_path)
    resumed("train_begin")
    steps_of(resumed, range(5, 15))
    assert torch.equal(whole.average.averages["weight"], resumed.average.averages["weight"])
    assert whole.average.num_updates == resumed.average.num_updates == 15
    whole("train_end")
    resumed("train_end")
    assert torch.equal(whole.model.weight, resumed.model.weight)


def test_training_ends_with_the_average_of_the_best_checkpoint(tmp_path):
    run = Run(one_weight(1.0), load_best_model_at_end=True)
    run("train_begin")
    run.step(2.0)
    run.average.save(tmp_path)
    run.state.best_model_checkpoint = str(tmp_path)
    run.step(9.0)
    run("train_end")
    assert run.model.weight.item() == pytest.approx(1.9)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path):
    run = Run(one_weight())
    with pytest.raises(ValueError, match=rf"has no {AVERAGE_FILE}: that run did not average"):
        run.average.load(tmp_path)
    (tmp_path / AVERAGE_FILE).write_bytes(b"torn")
    with pytest.raises(ValueError, match="cannot be read"):
        run.average.load(tmp_path)
    other = Run(nn.Linear(1, 1))
    other("train_begin")
    other.average.save(tmp_path)
    with pytest.raises(ValueError, match=r"bias is \(1,\) there and missing here"):
        run.average.load(tmp_path)
    wide = Run(nn.Linear(2, 1))
    with pytest.raises(ValueError, match=r"weight is \(1, 1\) there and \(1, 2\) here"):
        wide.average.load(tmp_path)
