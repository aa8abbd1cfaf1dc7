"""What the verbs of `clipmini` share: results on stdout, all else on stderr, errors as one sentence.

File names, captions and labels may hold anything. All that is printed goes through `show`, `print_table` or
`print_json`, so that no name moves the cursor or prints a line of its own.
"""

import contextlib
import importlib.abc
import json
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand, TyperGroup

if TYPE_CHECKING:
    from clipmini.evaluation.results import Table as Content

logger = logging.getLogger(__name__)

WIDE = 10_000  # columns of a table in a file or a pipe, where no row needs to wrap
MAX_NEAR = 100  # characters shown on either side of what is wrong
PLAIN = "\u00a0\u202f\u3000\u200c\u200d"  # spaces, and joiners of letters and of emoji


class Commands(TyperGroup):
    """The group of verbs, which all log and fail in the same way."""

    def invoke(self, ctx: Any) -> Any:
        """Run a verb; report bad input in one sentence with exit code 2, and a bug by its traceback with 1."""
        try:
            with _logging_to_stderr():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            show("interrupted", err=True)
            raise typer.Exit(130) from None
        except (BrokenPipeError, typer.Exit, typer.Abort):  # `clipmini ... | head`; the end of --help
            raise
        except Exception as error:
            sentence = _as_sentence(error)
            if sentence is None or ctx.params.get("debug"):
                show(*_traceback_lines(error), err=True)
            if sentence is None:
                raise typer.Exit(1) from error
            show(f"error: {sentence}", err=True)
            raise typer.Exit(2) from None


class RecipeCommand(TyperCommand):
    """A verb that takes keys of a recipe as options, and lists them in its help."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Print the help, and all keys by section with their defaults."""
        from clipmini.recipe_files import RECIPE_KEYS, section_options

        super().format_help(ctx, formatter)
        own, inherited = section_options("training")
        groups = {
            "Keys of a recipe: --KEY VALUE": RECIPE_KEYS,
            "data: the images and captions": section_options("data")[0],
            "model_config: the model, beside its towers": section_options("model_config")[0],
            "training": own,
            "training: inherited from transformers.TrainingArguments, where all of it is said": inherited,
        }
        console = Console(highlight=False, markup=False)
        for title, options in groups.items():
            table = Table("key", "default", "", title=title, title_justify="left", box=None, pad_edge=False)
            for name, option in options.items():
                table.add_row(name, option.default, option.help[:1].upper() + option.help[1:])
            console.print(table, "")


def complete_recipe(start: str) -> list[str]:
    """List the recipes in the package whose name begins so; the shell adds files."""
    from clipmini.recipe_files import preset_names

    return [name for name in preset_names("recipes") if name.startswith(start)]


def complete_task(start: str) -> list[str]:
    """List the tasks of an evaluation whose name begins so."""
    from clipmini.evaluation.request import OPTIONS

    return [task for task in OPTIONS if task.startswith(start)]


def show(*lines: object, err: bool = False) -> None:
    """Print texts on stdout or stderr, each on a line."""
    for line in lines:
        typer.echo(_visible(line), err=err)


def _visible(text: object) -> str:
    """Escape what would move the cursor, end the line, or turn the writing direction."""
    return "".join(
        character if character.isprintable() or character in PLAIN else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def _traceback_lines(error: BaseException) -> list[str]:
    """Return a traceback; further lines of a message are indented, so that none looks like one of ours."""
    parts = (re.sub(r"\n(?=\S)", "\n  ", part) for part in traceback.format_exception(error))
    return "".join(parts).rstrip("\n").split("\n")


def _on_one_line(message: str) -> str:
    """Join the lines in which some libraries lay out a message."""
    return re.sub(r"\s*\n\s*", " ", message.strip())


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Print a table as wide as the terminal, or without wrapping if stdout is no terminal; an empty row is a line."""
    table = Table(*map(_visible, columns))
    for row in rows:
        if row:
            table.add_row(*map(_visible, row))
        else:
            table.add_section()
    width = None if sys.stdout.isatty() else WIDE
    # Brackets and colons in a file name are neither markup nor emoji.
    Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False).print(table)


def print_contents(contents: "Sequence[Content]") -> None:
    """Print the tables of a run or of a report."""
    for content in contents:
        show(f"{content.title}. {content.note}" if content.note else content.title)
        if content.columns:
            print_table(content.columns, content.rows)


def print_json(value: Any) -> None:
    """Print a value as JSON."""
    typer.echo(json.dumps(value, indent=2))


def as_overrides(arguments: list[str]) -> list[str]:
    """Turn options that are keys of a recipe, `--key value` or `--key=value`, into "key=value" strings.

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
        message = error.format_message().rstrip(".")
        return f"{message}{'' if message.endswith('?') else '.'} See `{command} --help`."
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}."
    if isinstance(error, UnicodeEncodeError):  # a file name or a text of the data
        near = error.object[max(0, error.start - MAX_NEAR) : error.end + MAX_NEAR]
        return f"{near} is not in UTF-8: rename or correct it."
    is_of_package = isinstance(error, ImportError) and "install" in str(error)  # one that an option needs
    if isinstance(error, (ValueError, OSError)) or is_of_package:
        message = str(error)
        if "\nOriginal Traceback " in message:  # torch wraps what a data worker raised
            message = message.rpartition(f"{type(error).__name__}: ")[2]
        return _on_one_line(message) or type(error).__name__
    return None


def quiet_progress_bars() -> None:
    """Draw no progress bars, of any library, where stderr is a file or a pipe: each step would be a line there.

    Call this before tqdm is imported, which then reads its variable. `training` still writes a line per evaluation.
    """
    if sys.stderr is None or not sys.stderr.isatty():  # None: started without any console, as by pythonw
        os.environ.setdefault("TQDM_DISABLE", "1")


@contextlib.contextmanager
def working() -> Iterator[None]:
    """Keep stdout free for results while a verb works, and show progress bars only for training and embedding."""
    if "transformers" in sys.modules:
        _quiet_transformers()
    elif not any(isinstance(finder, _QuietingFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _QuietingFinder())
    with contextlib.redirect_stdout(sys.stderr):
        yield


class _QuietingFinder(importlib.abc.MetaPathFinder):
    """An import hook that finds nothing, but quiets transformers once a model is about to be imported.

    To import transformers takes 0.6 seconds, which wrong input must not cost.
    """

    def find_spec(self, name: str, *_: Any) -> None:
        """Act at the import of the model's first file, which comes before any use of transformers."""
        if name == "modeling_clipmini.configuration_clipmini":
            sys.meta_path.remove(self)
            _quiet_transformers()


def _quiet_transformers() -> None:
    from transformers import dynamic_module_utils
    from transformers.utils import logging as transformers_logging

    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # refuse to run a model's code rather than ask
    transformers_logging.disable_default_handler()
    transformers_logging.enable_propagation()
    transformers_logging.disable_progress_bar()  # of loading and saving weights


@contextlib.contextmanager
def _logging_to_stderr() -> Iterator[None]:
    """Show log records and Python's warnings as short lines."""

    def show_warning(message: Warning | str, *_: Any, **__: Any) -> None:
        logger.warning("%s", message)

    handler = _LineHandler()
    logging.getLogger().addHandler(handler)
    logging.getLogger("clipmini.data").setLevel(logging.INFO)  # what a source was found to be
    try:
        with warnings.catch_warnings():
            warnings.showwarning = show_warning
            yield
    finally:
        logging.getLogger().removeHandler(handler)


class _LineHandler(logging.Handler):
    """Write "warning: ..." to stderr, above the progress bar if there is one; information has no word before it."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        try:
            level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            error = record.exc_info and record.exc_info[1]  # of a bug in the server
            for line in (level + _on_one_line(record.getMessage()), *(_traceback_lines(error) if error else ())):
                tqdm.write(_visible(line), file=sys.stderr)
        except Exception:
            self.handleError(record)
