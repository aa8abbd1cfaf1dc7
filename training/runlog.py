"""What a run leaves to be read later: metrics as they were logged, versions, and why it stopped."""

import json
import math
import os
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

NUM_NAMES_SHOWN = 8


class NonFiniteLossError(ValueError):
    """The loss is NaN or infinite: every weight would be NaN after the next step."""


class MetricsLog(TrainerCallback):
    """Writes what `Trainer` logs while it trains to a file, as one JSON object per line.

    Each has `step`, `epoch` and `time` (UTC) first. NaN and infinity, which JSON does not have, become null. A run
    that starts anew empties the file; a resumed one first takes out what was logged after the checkpoint that it goes
    on from, so that nothing is there twice.

    Args:
        file: `metrics.jsonl` in the run's folder, which is made if need be.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Keep those lines of an earlier run that the checkpoint knows of."""
        if not state.is_world_process_zero:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # The count, since what is logged once at the end (`train_runtime`) has the last checkpoint's step as well.
        kept = _lines_up_to(self.file, state.global_step)[: len(state.log_history)]
        beside = self.file.with_name(f".{self.file.name}.{os.getpid()}")
        beside.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        beside.replace(self.file)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Append a line."""
        if not state.is_world_process_zero:
            return
        entry = {"step": state.global_step, "epoch": state.epoch, "time": datetime.now(UTC).isoformat("T", "seconds")}
        entry |= {name: _json_value(value) for name, value in (logs or {}).items()}
        with self.file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry, allow_nan=False) + "\n")


def check_finite(loss: Tensor | float, step: int, names: Sequence[str]) -> None:
    """Stop a run whose loss says nothing any more.

    Args:
        loss: of one batch, a scalar.
        step: the optimizer step that the batch belongs to.
        names: the batch's pictures, as far as they have names.

    Raises:
        NonFiniteLossError: the loss is NaN or infinite; the message names step, pictures and remedies.
    """
    value = float(loss)
    if math.isfinite(value):
        return
    where = f"at step {step}"
    if names:
        where += f", on the pictures {', '.join(names[:NUM_NAMES_SHOWN])}"
    if len(names) > NUM_NAMES_SHOWN:
        where += f" and {len(names) - NUM_NAMES_SHOWN} more"
    raise NonFiniteLossError(
        f"the loss is {value} {where}; lower learning_rate, clip gradients with max_grad_norm=1, or train in float32 "
        "or bf16 if it was fp16."
    )


def _lines_up_to(file: Path, step: int) -> list[str]:
    """Give the whole lines of at most that step; a process that was killed may have left a part of one."""
    if not file.exists():
        return []
    lines = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if entry["step"] <= step:
            lines.append(line)
    return lines


def _json_value(value: Any) -> Any:
    if value is None or isinstance(value, (int, str)):
        return value
    number = float(value)  # a scalar of numpy or torch as well
    return number if math.isfinite(number) else None
