import itertools
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F

from clipmini.training import objective as objective_module
from clipmini.training.objective import ContrastiveObjective, Embeddings
from modeling_clipmini import infonce_loss, sigmoid_loss
from modeling_clipmini.loss_clipmini import infonce_rows

SCALE = torch.tensor(7.0)
BIAS = torch.tensor(-3.0)
IDS = torch.tensor([1, 2, 1, 3, 4, 5, 3])


def make_embeddings(width=6, teacher_width=None):
    generator = torch.Generator().manual_seed(0)

    def rows(width):
        return F.normalize(torch.randn(len(IDS), width, generator=generator), dim=-1)

    teacher = () if teacher_width is None else (rows(teacher_width), rows(teacher_width))
    return Embeddings(rows(width).requires_grad_(), rows(width).requires_grad_(), IDS, *teacher)


def gradients(loss, pairs):
    return torch.autograd.grad(loss, [pairs.image, pairs.text])


@pytest.mark.parametrize("bias", [None, BIAS])
def test_on_one_process_it_is_the_models_own_loss(bias):
    pairs = make_embeddings()
    own = infonce_loss if bias is None else sigmoid_loss
    expected = own(pairs.image, pairs.text, SCALE, *([] if bias is None else [bias]), IDS)
    assert ContrastiveObjective()(pairs, SCALE, bias).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"hardness": 0.5}])
def test_options_of_the_loss_count_in_both_directions(options):
    pairs = make_embeddings()
    rows = [
        infonce_rows(queries, candidates, SCALE, IDS, IDS, **options)
        for queries, candidates in ((pairs.image, pairs.text), (pairs.text, pairs.image))
    ]
    assert ContrastiveObjective(**options)(pairs, SCALE).item() == pytest.approx(sum(rows).mean().item() / 2, abs=1e-6)


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("chunk_size", [1, 2, 3, 6])
def test_chunks_change_neither_loss_nor_gradient(bias, chunk_size):
    pairs = make_embeddings(teacher_width=4)
    options = {"hardness": 0.3, "distillation": 0.4, "matryoshka_dims": (3, 2), "teacher_scale": 9.0}
    if bias is None:
        options["label_smoothing"] = 0.1
    whole = ContrastiveObjective(**options)(pairs, SCALE, bias)
    chunked = ContrastiveObjective(**options, chunk_size=chunk_size)(pairs, SCALE, bias)
    assert chunked.item() == pytest.approx(whole.item(), abs=1e-6)
    for one, other in zip(gradients(whole, pairs), gradients(chunked, pairs), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


class Threads:
    """The part of `torch.distributed` that gathering uses, for threads in place of processes."""

    def __init__(self, num_threads):
        self.rows, self.barrier = [None] * num_threads, threading.Barrier(num_threads, timeout=20)
        self.own = threading.local()

    def is_available(self):
        return True

    is_initialized = is_available

    def get_world_size(self):
        return len(self.rows)

    def get_rank(self):
        return self.own.rank

    def exchange(self, rows):
        self.rows[self.own.rank] = rows.detach().clone()
        self.barrier.wait()
        exchanged = list(self.rows)
        self.barrier.wait()  # nobody sends anything else before all have read
        return exchanged

    def all_gather(self, parts, rows):
        for part, received in zip(parts, self.exchange(rows), strict=True):
            part.copy_(received)  # which refuses another shape

    def all_reduce(self, rows):
        rows.copy_(sum(self.exchange(rows)))

    def run(self, function, arguments):
        def start(rank):
            self.own.rank = rank
            return function(arguments[rank])

        with ThreadPoolExecutor(len(self.rows)) as pool:
            return list(pool.map(start, range(len(self.rows))))


@pytest.mark.parametrize("bias", [None, BIAS])
@pytest.mark.parametrize("sizes", [(4, 3), (1, 5, 1)])
@pytest.mark.parametrize(
    "options", [{}, {"hardness": 0.3, "distillation": 0.4, "matryoshka_dims": (3, 2), "teacher_scale": 9.0}]
)
def test_shares_of_processes_and_their_gradients_sum_to_those_of_one(monkeypatch, bias, sizes, options):
    objective, pairs = ContrastiveObjective(**options), make_embeddings(teacher_width=4)
    whole = objective(pairs, SCALE, bias)
    threads = Threads(len(sizes))
    monkeypatch.setattr(objective_module, "dist", threads)

    def train(own):
        own = own._replace(image=own.image.detach().requires_grad_(), text=own.text.detach().requires_grad_())
        share = objective(own, SCALE, bias)
        share.backward()
        return share.item(), own.image.grad, own.text.grad

    ends = list(itertools.accumulate(sizes, initial=0))
    found = threads.run(train, [pairs.select(slice(*bounds)) for bounds in itertools.pairwise(ends)])
    shares, images, texts = zip(*found, strict=True)
    assert sum(shares) == pytest.approx(whole.item(), abs=1e-6)
    for one, parts in zip(gradients(whole, pairs), (images, texts), strict=True):
        assert torch.allclose(torch.cat(parts), one, atol=1e-6)


@pytest.mark.parametrize(
    "options", [{"chunk_size": 2}, {"matryoshka_dims": (3, 2)}, {"distillation": 0.5}], ids=["rows", "widths", "terms"]
)
def test_no_logits_are_kept_for_the_backward_pass(monkeypatch, options):
    """Counts what autograd keeps, and the most rows that are ever made at once."""
    largest = []

    def watched(queries, *args):
        rows = objective_infonce(queries, *args)
        largest.append(len(queries))
        return rows

    objective_infonce = objective_module.infonce_rows
    monkeypatch.setattr(objective_module, "infonce_rows", watched)
    pairs = make_embeddings(teacher_width=4)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        loss = ContrastiveObjective(**options)(pairs, SCALE)
    loss.backward()
    assert max(largest) == options.get("chunk_size", len(IDS))
    assert not [shape for shape in kept if len(shape) == 2 and shape[1] == len(IDS)]  # chunk by chunk, (*, 7)


def test_matryoshka_is_the_mean_over_widths_of_cut_and_normalized_embeddings():
    pairs = make_embeddings()
    losses = [
        infonce_loss(F.normalize(pairs.image[:, :d], dim=-1), F.normalize(pairs.text[:, :d], dim=-1), SCALE, IDS)
        for d in (6, 4, 2)
    ]
    loss = ContrastiveObjective(matryoshka_dims=(4, 2))(pairs, SCALE)
    assert loss.item() == pytest.approx(sum(losses).item() / 3, abs=1e-6)


def test_distillation_mixes_in_the_teacher_by_its_weight():
    pairs = make_embeddings(teacher_width=3)
    alone = ContrastiveObjective()(pairs, SCALE).item()
    copied = ContrastiveObjective(distillation=1.0, teacher_scale=9.0)(pairs, SCALE).item()
    mixed = ContrastiveObjective(distillation=0.25, teacher_scale=9.0)(pairs, SCALE).item()
    assert mixed == pytest.approx(0.75 * alone + 0.25 * copied, abs=1e-6)
    same = Embeddings(pairs.image, pairs.text, IDS, pairs.image.detach(), pairs.text.detach())
    assert ContrastiveObjective(distillation=1.0, teacher_scale=7.0)(same, SCALE).item() == pytest.approx(0, abs=1e-6)
