"""What all verbs of the `clipmini` command share: results on stdout, all else on stderr, errors in a sentence."""

import contextlib
import json
import logging
import sys
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    from clipmini.data.images import Skipped

logger = logging.getLogger(__name__)

WIDE = 10_000  # columns where no terminal is: a table in a file or a pipe need not fold


class Commands(TyperGroup):
    """The verbs, with one way for all to log and to fail."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; turn bad input into one sentence and exit code 2. Any other exception is a bug and shows."""
        try:
            with _logging_to_stderr():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("interrupted", err=True)
            raise typer.Exit(130) from None
        except BrokenPipeError:  # `clipmini ... | head`
            raise
        except Exception as error:
            sentence = _as_sentence(error)
            if sentence is None:
                raise
            if ctx.params.get("debug"):
                traceback.print_exc()
            typer.echo(f"error: {sentence}", err=True)
            raise typer.Exit(2) from None


def print_table(table: Table) -> None:
    """Print a table as wide as the terminal, or where there is none unfolded."""
    width = None if sys.stdout.isatty() else WIDE
    # Brackets and colons in a file name are neither markup nor emoji.
    Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False).print(table)


def visible(text: str | Path) -> str:
    """Escape what would move the cursor or break a table, as file names may."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def print_json(value: dict[str, Any]) -> None:
    """Print JSON."""
    typer.echo(json.dumps(value, indent=2))


def skipped_as_json(skipped: "Skipped") -> dict[str, Any]:
    """Give what was left out under the keys that every verb uses."""
    items = [{"path": name, "reason": reason} for name, reason in skipped.items]
    return {"num_skipped": skipped.count, "skipped": items}


def as_overrides(arguments: list[str]) -> list[str]:
    """Read `--key value` and `--key=value`, for the options that are keys of a recipe.

    Args:
        arguments: what the command did not know.

    Returns:
        "key=value" strings.

    Raises:
        ValueError: an argument is no option, or has no value.
    """
    rest = iter(arguments)
    overrides = []
    for argument in rest:
        name, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise ValueError(f"{argument!r} is not expected here; a recipe's key is changed by --key value.")
        if not separator:
            value = next(rest, None) or ""
            if not value:
                raise ValueError(f"{argument} needs a value.")
        overrides.append(f"{name}={value}")
    return overrides


def _as_sentence(error: Exception) -> str | None:
    """Say in one line what was wrong with the input, or nothing where the error is not the user's."""
    if hasattr(error, "format_message"):  # a usage error: the class lives in click or in typer, by typer's version
        return f"{error.format_message().rstrip('.')}. See `{_command_path(error)} --help`."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, (ValueError, OSError)):
        message = str(error)
        if "\nOriginal Traceback " in message:  # torch's wrapping of what a data worker raised
            message = message.rpartition(f"{type(error).__name__}: ")[2]
        return " ".join(message.split()) or type(error).__name__
    return None


def _command_path(error: Any) -> str:
    context = getattr(error, "ctx", None)
    return context.command_path if context else "clipmini"


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Keep stdout for the results while a verb works, and the bars for what takes time: training and embedding."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # never ask whether to run a model's code: refuse
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # of loading and saving weights
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Show what is logged, and Python's warnings, as short lines."""

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        logger.warning("%s", " ".join(str(message).split()))

    handler = _LineHandler()
    logging.getLogger().addHandler(handler)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    finally:
        logging.getLogger().removeHandler(handler)


class _LineHandler(logging.Handler):
    """Write "warning: ..." to stderr, above a progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
        except Exception:
            self.handleError(record)
