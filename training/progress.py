"""How a run goes, while it goes: a live table on a terminal, plain lines in a log file."""

import logging
import re
import sys
from collections.abc import Callable
from datetime import timedelta
from time import monotonic
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.file_proxy import FileProxy
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SECONDS_BETWEEN_LINES = 30
SECONDS_OF_SPEED = 300  # what the time left is estimated from: long enough to hold an evaluation or two
NUMBERS = {
    "loss": ("loss", ".3f"),
    "temperature": ("temperature", ".4f"),
    "grad_norm": ("gradient norm", ".2f"),
    "pairs_per_second": ("pairs/s", ".0f"),
}
RECALL_AT = (1, 5)
DIRECTIONS = ("text_to_image", "image_to_text")
MOVES = re.compile(r"(\n|\x1b\[A)*")  # the next line, the line above


class LiveTable(TrainerCallback):
    """Shows step, time left, loss, temperature, gradient norm, pairs per second and validation recalls in percent.

    All goes to stderr; stdout is left alone. On a terminal it is a table that renews itself, and what is logged or
    warned meanwhile is written above it; bars of tqdm do not show meanwhile. Elsewhere it is one line per evaluation
    and one per 30 seconds of training, without control characters.

    `Trainer` calls no callback when training raises: whoever calls `train` calls `close` in a `finally` block, or the
    terminal stays without a cursor.
    """

    def __init__(self) -> None:
        self.latest: dict[str, float] = {}
        self.best: dict[str, float] = {}
        self.progress: Progress | None = None
        self.screen: Screen | None = None
        self.last_line_s = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the table; a resumed run knows its best recalls from the run before."""
        self.close()
        self.latest, self.best = {}, {}
        if not state.is_world_process_zero:
            return
        for entry in state.log_history:
            self._take(entry)
        console = Console(file=sys.stderr)
        self.progress = Progress(
            BarColumn(),
            TextColumn("step"),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("left"),
            console=console,
            speed_estimate_period=SECONDS_OF_SPEED,
        )
        self.progress.add_task("training", total=state.max_steps, completed=state.global_step)
        self.last_line_s = monotonic()
        # isatty is asked as well, since FORCE_COLOR makes Rich take a log file for a terminal
        if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
            self.screen = Screen(console, self._table)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Move the bar."""
        if self.progress is None:
            return
        self.progress.update(self.progress.task_ids[0], completed=state.global_step)
        if self.screen is None and monotonic() - self.last_line_s >= SECONDS_BETWEEN_LINES:
            self._write_line(state)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take what was logged into the table."""
        self._take(logs or {})

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write what was measured, where there is no table; `on_log` has taken it in already."""
        if self.progress is not None and self.screen is None:
            self._write_line(state, with_recalls=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the table as it stands."""
        self.close()

    def close(self) -> None:
        """Give the terminal back, the last table staying on it; does nothing where that is done already."""
        if self.screen is not None:
            self.screen.close()
        self.screen = self.progress = None

    def _take(self, logs: dict[str, float]) -> None:
        self.latest.update(logs)
        if "logit_scale" in logs:
            self.latest["temperature"] = 1 / logs["logit_scale"]
        for key in (_recall_key(direction, k) for direction in DIRECTIONS for k in RECALL_AT):
            if key in logs:
                self.best[key] = max(logs[key], self.best.get(key, 0.0))

    def _table(self) -> Group:
        assert self.progress is not None
        numbers = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        for name, _ in NUMBERS.values():
            numbers.add_column(name, justify="right", header_style="dim")
        numbers.add_row(*(self._number(key) for key in NUMBERS))
        recalls = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0))
        recalls.add_column("validation, %", header_style="dim")
        for k in RECALL_AT:
            recalls.add_column(f"R@{k}", header_style="dim")
        for direction in DIRECTIONS:
            recalls.add_row(direction.replace("_", " "), *(self._recall(_recall_key(direction, k)) for k in RECALL_AT))
        return Group(self.progress, numbers, recalls) if self.best else Group(self.progress, numbers)

    def _write_line(self, state: TrainerState, *, with_recalls: bool = False) -> None:
        assert self.progress is not None
        parts = [f"step {state.global_step}/{state.max_steps}", f"epoch {state.epoch or 0:.4g}"]
        parts += [f"{name} {self._number(key)}" for key, (name, _) in NUMBERS.items() if key in self.latest]
        left_s = self.progress.tasks[0].time_remaining
        if left_s:
            parts.append(f"{timedelta(seconds=round(left_s))} left")
        if with_recalls:
            parts += [
                f"{direction.replace('_', ' ')} R@{k} {self._recall(_recall_key(direction, k))}"
                for direction in DIRECTIONS
                for k in RECALL_AT
                if _recall_key(direction, k) in self.best
            ]
        sys.stderr.write(", ".join(parts) + "\n")
        sys.stderr.flush()
        self.last_line_s = monotonic()

    def _number(self, key: str) -> str:
        return format(self.latest[key], NUMBERS[key][1]) if key in self.latest else "-"

    def _recall(self, key: str) -> str:
        if key not in self.best:
            return "-"
        value, best = self.latest[key], self.best[key]
        return f"{100 * value:.1f} (best)" if value >= best else f"{100 * value:.1f} (best {100 * best:.1f})"


class Screen:
    """A terminal's last lines, held for a table until `close`; what others write to stderr goes above them.

    Args:
        console: writes to the terminal, which must be `sys.stderr`.
        table: gives what to show; called twice a second, from another thread.
    """

    def __init__(self, console: Console, table: Callable[[], RenderableType]) -> None:
        self.stderr: TextIO = sys.stderr
        self.live = Live(
            get_renderable=table, console=console, refresh_per_second=2, redirect_stdout=False, redirect_stderr=False
        )
        self.live.start(refresh=True)
        above: Any = AboveTable(console, self.stderr)
        # A handler keeps the stream that it was made with, so that to exchange sys.stderr does not reach it.
        self.handlers = [handler for handler in _stream_handlers() if handler.stream is self.stderr]
        self._redirect(above)

    def close(self) -> None:
        """Draw the table for the last time and leave it."""
        self._redirect(self.stderr)
        self.live.stop()

    def _redirect(self, stream: TextIO) -> None:
        sys.stderr = stream
        for handler in self.handlers:
            handler.setStream(stream)


class AboveTable(FileProxy):
    """Writes whole lines above a live table, and no bars of tqdm: each of their redraws would become a line."""

    is_in_line = False

    def write(self, text: str) -> int:
        """Write `text`, unless it is a bar or moves the cursor for one."""
        if text.startswith("\r") or (not self.is_in_line and MOVES.fullmatch(text)):
            return len(text)
        self.is_in_line = not text.endswith("\n")
        return super().write(text)

    def flush(self) -> None:
        """Write a line that has been begun."""
        super().flush()
        self.is_in_line = False


def _recall_key(direction: str, k: int) -> str:
    return f"eval_{direction}_r{k}"


def _stream_handlers() -> list[logging.StreamHandler]:
    named = [item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger)]
    handlers = [handler for logger in (logging.root, *named) for handler in logger.handlers]
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


RecallProgress = LiveTable
