"""The `clipmini` command: one thin function per verb.

Results go to stdout, everything else (warnings, progress, errors) to stderr. Exit codes: 0 success, 1 a bug, 2 bad
input, 130 interrupted. What is slow to import is imported by the verb that needs it, so that `--help` is instant.
"""

import contextlib
import json
import logging
import shlex
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperGroup

if TYPE_CHECKING:
    from .images import Skipped

logger = logging.getLogger(__name__)

WIDE = 10_000  # columns where no terminal is: a table in a file or a pipe need not fold
METRIC_NAMES = {
    **{f"text_to_image_r{k}": f"text to image R@{k}" for k in (1, 5, 10)},
    **{f"image_to_text_r{k}": f"image to text R@{k}" for k in (1, 5, 10)},
    "mean_recall": "mean recall",
}


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


app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command; the console script's entry point."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text, nor terminals UTF-8
    app(prog_name="clipmini")


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"clipmini {installed_version('clipmini')}")
        raise typer.Exit


AsJson = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else on stdout.")]
Strict = Annotated[bool, typer.Option("--strict", help="Stop at the first input that cannot be used.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a Hub id.")]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Train your own small CLIP, and use it to search and classify pictures with words."""


@app.command(
    epilog="Example: clipmini train demo --num_train_epochs 10 --output_dir runs/short",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A recipe's name, such as demo, or a YAML file.")],
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable. Or --KEY VALUE."),
    ] = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Run this stage of the recipe alone.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the run in the output folder.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train a model by a recipe, and measure it before and after."""
    from clipmini.training.recipes import load_recipe
    from clipmini.training.train import train as run_recipe

    changes = [*(overrides or []), *_as_overrides(context.args)]
    with _working():
        loaded = load_recipe(recipe, [*changes, *(["data.strict=true"] if strict else [])])
        result = run_recipe(loaded, overwrite=overwrite, stage=stage)
    if loaded.training.process_index > 0:
        return  # one of several processes tells
    if as_json:
        places = {"model_dir": str(result.model_dir), "output_dir": str(result.output_dir)}
        _print_json({**result.results, **places})
        return
    for name, split in result.results["splits"].items():
        typer.echo(f"{name}: {split['num_images']} pictures, {split['num_captions']} captions; recall in percent")
        _print_table(_recall_table(split))
    folder = shlex.quote(_folder_to_search(loaded.data.source))
    typer.echo(f"The model is in {result.model_dir}")
    typer.echo(f'Try it: clipmini search {shlex.quote(str(result.model_dir))} {folder} "a dog on a beach"')


@app.command(epilog="Example: clipmini teach openai/clip-vit-base-patch32 flickr8k --out teacher.parquet")
def teach(
    model: ModelName,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="The recipe whose pairs the teacher embeds.")],
    out: Annotated[Path, typer.Option("--out", help="The parquet file to write.")],
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed a recipe's training pairs with a larger image-text model, for `train --teacher FILE` to learn from."""
    from clipmini.training.recipes import load_recipe
    from clipmini.training.teacher import embed_with_teacher
    from clipmini.training.train import load_recipe_pairs

    from .images import Skipped

    with _working():
        loaded = load_recipe(recipe, overrides or [])
        pairs = load_recipe_pairs(loaded, Skipped(strict=loaded.data.strict))["train"]
        embed_with_teacher(model, pairs, out, overwrite=overwrite)
    if as_json:
        _print_json({"file": str(out), "num_images": len(pairs)})
    else:
        typer.echo(f"{len(pairs)} pictures and their captions are in {out}")


@app.command(epilog='Example: clipmini search runs/demo/model ~/Pictures "a red fish near coral" --out result.png')
def search(
    model: ModelName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Pictures, in sub-folders too.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What the picture should show, in words.")],
    top: Annotated[int, typer.Option("--top", help="How many pictures to give.")] = 9,
    out: Annotated[Path | None, typer.Option("--out", help="Draw the results as a picture, such as x.png.")] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Find the pictures of a folder that fit a description."""
    from .encode import load_model
    from .images import Skipped
    from .search import check_search, draw_results, search_folder

    skipped = Skipped(strict)
    with _working():
        check_search(query, top, out)
        hits = search_folder(*load_model(model), folder, query, top, skipped)
    if as_json:
        found = [{"path": str(hit.path), "score": hit.score} for hit in hits]
        _print_json({"query": query, "hits": found, **_skipped_as_json(skipped)})
    else:
        table = Table("rank", "score", "picture")
        for number, hit in enumerate(hits, start=1):
            table.add_row(str(number), f"{hit.score:.3f}", _visible(hit.path))
        _print_table(table)
    skipped.log_summary()
    if out is not None:
        draw_results({query: hits}, out)
        typer.echo(f"drawn in {out}", err=True)


@app.command(epilog='Example: clipmini classify runs/demo/model photo.jpg --labels "cat,dog"')
def classify(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Picture files.")],
    labels: Annotated[str, typer.Option("--labels", help="What they may show, with commas between.")],
    template: Annotated[
        str, typer.Option("--template", help="The caption made of a label, which stands in place of {}.")
    ] = "a photo of a {}.",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Say which of some labels fits each picture best; no training on them is needed."""
    from .encode import load_model
    from .images import Skipped
    from .zero_shot import classify_files, fill_template

    names = [label.strip() for label in labels.split(",")]
    skipped = Skipped(strict)
    with _working():
        fill_template(names, template)
        results = classify_files(*load_model(model), images, names, template, skipped)
    if as_json:
        found = [{"path": str(path), "scores": [vars(item) for item in scores]} for path, scores in results]
        _print_json({"template": template, "results": found, **_skipped_as_json(skipped)})
    else:
        table = Table("picture", "label", "score")
        for path, scores in results:
            for index, item in enumerate(scores):
                table.add_row("" if index else _visible(path), _visible(item.label), f"{item.score:.1%}")
            table.add_section()
        _print_table(table)
    skipped.log_summary()


def _as_overrides(arguments: list[str]) -> list[str]:
    """Read `--key value` and `--key=value`, for the options that are keys of a recipe."""
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


def _folder_to_search(source: str) -> str:
    """Name the folder that was trained on where it holds pictures, as one with only tables does not."""
    from .images import find_images

    try:
        find_images(source)
    except ValueError:
        return "FOLDER"
    return source


def _recall_table(split: dict[str, Any]) -> Table:
    table = Table("")
    columns = ("chance", "before", "after")
    for column in columns:
        table.add_column(column, justify="right")
    for key, label in METRIC_NAMES.items():
        table.add_row(label, *(f"{100 * split[column][key]:.1f}" for column in columns))
    return table


def _print_table(table: Table) -> None:
    width = None if sys.stdout.isatty() else WIDE
    # Brackets and colons in a file name are neither markup nor emoji.
    Console(file=sys.stdout, width=width, markup=False, emoji=False, highlight=False).print(table)


def _visible(text: str | Path) -> str:
    """Escape what would move the cursor or break a table, as file names may."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in str(text)
    )


def _print_json(value: dict[str, Any]) -> None:
    typer.echo(json.dumps(value, indent=2))


def _skipped_as_json(skipped: "Skipped") -> dict[str, Any]:
    items = [{"path": name, "reason": reason} for name, reason in skipped.items]
    return {"num_skipped": skipped.count, "skipped": items}


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
def _working() -> Iterator[None]:
    """Keep stdout for the results while a verb works, and the bars for what takes time: training and embedding."""
    from transformers.utils import logging as transformers_logging

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


if __name__ == "__main__":
    main()
