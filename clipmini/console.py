"""What the verbs of `clipmini` share: results on stdout, all else on stderr, errors as one sentence."""

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

WIDE = 10_000  # columns of a table in a file or a pipe, where no row needs to wrap


class Commands(TyperGroup):
    """The group of verbs, which all log and fail in the same way."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; report bad input in one sentence with exit code 2. Any other error is a bug and is raised."""
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
    """Print a table as wide as the terminal, or without wrapping if stdout is no terminal."""
    width = None if sys.stdout.isatty() else WIDE
    # Brackets and colons in a file name are neither markup nor emoji.
    Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False).print(table)


def visible(text: str | Path) -> str:
    """Escape characters that would move the cursor or break a table, since file names may contain them."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def print_json(value: dict[str, Any]) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2))


def skipped_as_json(skipped: "Skipped") -> dict[str, Any]:
    """Return what was left out, under the keys that every verb uses."""
    items = [{"path": name, "reason": reason} for name, reason in skipped.items]
    return {"num_skipped": skipped.count, "skipped": items}


def as_overrides(arguments: list[str]) -> list[str]:
    """Parse options that are keys of a recipe, given as `--key value` or `--key=value`.

    Args:
        arguments: those that the command does not know.

    Returns:
        "key=value" strings.

    Raises:
        ValueError: an argument is not an option, or an option has no value.
    """
    rest = iter(arguments)
    overrides = []
    for argument in rest:
        name, separator, value = argument.removeprefix("--").partition("=")
        if not argument.startswith("--") or not name:
            raise ValueError(f"{argument!r} is not expected here; to change a key of the recipe, use --key value.")
        if not separator:
            value = next(rest, None) or ""
            if not value:
                raise ValueError(f"{argument} needs a value; write {argument} VALUE.")
        overrides.append(f"{name}={value}")
    return overrides


def _as_sentence(error: Exception) -> str | None:
    """Return one line on what is wrong with the input, or None if the error is not the user's."""
    if hasattr(error, "format_message"):  # a usage error, of click or of typer, depending on typer's version
        context = getattr(error, "ctx", None)
        command = context.command_path if context else "clipmini"
        return f"{error.format_message().rstrip('.')}. See `{command} --help`."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, (ValueError, OSError)):
        message = str(error)
        if "\nOriginal Traceback " in message:  # torch wraps what a data worker raised
            message = message.rpartition(f"{type(error).__name__}: ")[2]
        return " ".join(message.split()) or type(error).__name__
    return None


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Keep stdout free for results while a verb works, and show progress bars only for training and embedding."""
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # refuse to run a model's code rather than ask
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # of loading and saving weights
    with contextlib.redirect_stdout(sys.stderr):
        yield


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Show log records and Python's warnings as short lines."""

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
    """Write "warning: ..." to stderr, above the progress bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            tqdm.write(f"{record.levelname.lower()}: {record.getMessage()}", file=sys.stderr)
        except Exception:
            self.handleError(record)
