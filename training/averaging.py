"""An average of the weights over the steps of a run."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

AVERAGE_FILE = "weight_average.safetensors"


class WeightAverage(TrainerCallback):
    """An exponential moving average of the weights that train; a run ends with it in place of the last weights.

    After each optimizer step, `average = d * average + (1 - d) * weights`, with `d = min(decay, (1 + n) / (10 + n))`
    after n earlier steps, so that the random heads of the beginning are soon forgotten. Frozen weights and buffers are
    the model's own. Weights of 16 bits are averaged in float32, in which small steps are not lost.

    `Trainer` trains and saves the plain weights, so that a checkpoint goes on as it was. Beside that it must call:

    - `applied` around each evaluation, so that the average is what is measured and chosen by;
    - `save` in `_save_optimizer_and_scheduler`, before the state is written that marks a checkpoint as whole;
    - `load` in `_load_optimizer_and_scheduler`.

    At the end of training the average goes into the model: the best checkpoint's with `load_best_model_at_end`.

    Args:
        model: in its place (device) and with frozen what is to be frozen.
        decay: from 0, which keeps the last weights, up to but not 1; 0.999 looks back over about 1000 steps.

    Raises:
        ValueError: `decay` is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay} is not allowed; use a number from 0 to below 1, such as 0.999.")
        self.decay = decay
        self.weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        self.averages: dict[str, Tensor] = {}
        self.num_updates = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start from the weights as they are, unless `load` has been called."""
        if not self.averages:
            self.averages = {
                name: weight.detach().to(torch.promote_types(weight.dtype, torch.float32), copy=True)
                for name, weight in self.weights.items()
            }

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the average towards the new weights."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        averages = list(self.averages.values())
        weights = [weight.detach().to(self.averages[name].dtype) for name, weight in self.weights.items()]
        get_ema_multi_avg_fn(decay)(averages, weights, self.num_updates)
        self.num_updates += 1

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the average in the model: the best checkpoint's if `Trainer` has gone back to that, or the last."""
        if args.load_best_model_at_end and state.best_model_checkpoint is not None:
            self.load(Path(state.best_model_checkpoint))
        self._copy_into_model(self.averages)
        self.averages, self.num_updates = {}, 0  # from here on the model's weights are the average

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Put the average into the model within a `with` block; after it the weights are what they were, bit by bit.

        Before the first step, and outside of training, the model stays as it is.
        """
        weights = {name: self.weights[name].detach().clone() for name in self.averages}
        self._copy_into_model(self.averages)
        try:
            yield
        finally:
            self._copy_into_model(weights)

    def save(self, folder: Path) -> None:
        """Write the average into a checkpoint.

        Args:
            folder: the checkpoint's, which exists.
        """
        tensors = {name: average.contiguous() for name, average in self.averages.items()}
        save_file(tensors, folder / AVERAGE_FILE, metadata={"num_updates": str(self.num_updates)})

    def load(self, folder: Path) -> None:
        """Take over the average that `save` wrote.

        Args:
            folder: the checkpoint's.

        Raises:
            ValueError: there is none, or it is of other weights than those that train here.
        """
        file = folder / AVERAGE_FILE
        if not file.is_file():
            raise ValueError(f"{folder} has no {AVERAGE_FILE}: that run did not average its weights; start it anew.")
        with _opened(file) as saved:
            found = {name: tuple(saved.get_slice(name).get_shape()) for name in saved.keys()}
            wanted = {name: tuple(weight.shape) for name, weight in self.weights.items()}
            if found != wanted:
                odd = min(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
                raise ValueError(
                    f"{file} is the average of other weights than those that train here ({odd} is "
                    f"{found.get(odd, 'missing')} there and {wanted.get(odd, 'missing')} here); start the run anew."
                )
            self.averages = {name: saved.get_tensor(name).to(weight.device) for name, weight in self.weights.items()}
            self.num_updates = int(saved.metadata()["num_updates"])

    @torch.no_grad()
    def _copy_into_model(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self.weights[name].copy_(value)


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be read ({error}); copy or train it again.") from error
    with handle as opened:
        yield opened
