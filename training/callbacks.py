"""What a run says while it goes, and why it stops: transformers' bar, a line per evaluation, and no step after NaN."""

import math
import sys
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from transformers import ProgressCallback

NUM_NAMES_SHOWN = 8
BESIDE_THE_BAR = {"loss": "{:.3f}", "logit_scale": "{:.1f}", "grad_norm": "{:.2f}", "pairs_per_second": "{:.0f}"}
RECALLS = {
    f"{direction}_r{k}": f"{direction.replace('_', ' ')} R@{k}"
    for direction in ("text_to_image", "image_to_text")
    for k in (1, 5)
}


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite: every weight would be NaN after the next step."""


class TrainingBar(ProgressCallback):
    """Shows transformers' bar with the latest figures beside it, and writes one line for each evaluation.

    All goes to stderr, and so leaves stdout to results. Transformers' own callback writes a line for every log.
    """

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **kwargs: Any) -> None:
        """Put loss, temperature's inverse, gradient norm and speed beside the bar."""
        if self.training_bar is not None:
            logs = logs or {}
            shown = {name: form.format(logs[name]) for name, form in BESIDE_THE_BAR.items() if name in logs}
            self.training_bar.set_postfix(shown)

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float] | None = None, **kwargs: Any
    ) -> None:
        """Write what was measured, in percent."""
        super().on_evaluate(args, state, control, **kwargs)
        if self.training_bar is not None:
            measured = {name: value for name, value in (metrics or {}).items() if isinstance(value, float)}
            parts = [
                f"{words} {100 * measured[f'eval_{name}']:.1f}"
                for name, words in RECALLS.items()
                if f"eval_{name}" in measured
            ]
            line = f"step {state.global_step}/{state.max_steps}, epoch {state.epoch or 0:.4g}: {', '.join(parts)}"
            self.training_bar.write(line, file=sys.stderr)


def check_finite(loss: Tensor | float, step: int, names: Sequence[str]) -> None:
    """Stop a run whose loss says nothing any more.

    Args:
        loss: of one batch, a scalar.
        step: the optimizer step that the batch belongs to.
        names: the batch's images, as far as they have names.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; the message names step, images and remedies.
    """
    value = float(loss)
    if math.isfinite(value):
        return
    where = f"at step {step}"
    if names:
        where += f", on the images {', '.join(names[:NUM_NAMES_SHOWN])}"
    if len(names) > NUM_NAMES_SHOWN:
        where += f" and {len(names) - NUM_NAMES_SHOWN} more"
    raise NonFiniteLossError(
        f"the loss is {value} {where}; lower learning_rate, clip gradients with max_grad_norm=1, or train in float32 "
        "or bf16 if it was fp16."
    )
