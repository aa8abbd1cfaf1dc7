"""The `clipmini` command: one thin function for each verb, over the functions of the package.

Results go to stdout, everything else (warnings, progress, errors) to stderr. Exit codes: 0 success, 1 a bug, 2 bad
input, 130 interrupted. Each verb imports what is slow to import by itself, so that `--help` is instant.
"""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import clipmini

from .console import (
    Commands,
    RecipeCommand,
    as_overrides,
    complete_recipe,
    complete_task,
    print_contents,
    print_json,
    print_table,
    quiet_progress_bars,
    working,
)

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command; the entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text, nor terminals UTF-8
    quiet_progress_bars()
    app(prog_name="clipmini")


def _flag(name: str, help: str, **options: Any) -> Any:
    """Return a typer option without a value, and without the "<bool>" that typer's help would show for one."""
    return typer.Option(name, help=help, metavar="", **options)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"clipmini {clipmini.__version__}")
        raise typer.Exit


AsJson = Annotated[bool, _flag("--json", "Print the results as JSON, with nothing else on stdout.")]
Strict = Annotated[bool, _flag("--strict", "Stop at the first image or caption that cannot be used.")]
AnyModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder or Hub id, of clipmini, transformers (CLIP, SigLIP) or sentence-transformers; or "
        "open_clip:NAME/PRETRAINED.",
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the recipe or the data. May be repeated."),
]
Template = Annotated[
    str | None,
    typer.Option(
        help='The caption of a label, with {} where the label goes; or a list of captions: "imagenet", "simple" or a '
        'YAML file. Default: "This is a photo of {}."',
    ),
]


@app.callback()
def options(
    version: Annotated[bool, _flag("--version", "Print the version.", callback=_print_version, is_eager=True)] = False,
    debug: Annotated[bool, _flag("--debug", "Print the traceback of every error.")] = False,
) -> None:
    """Train your own small CLIP, measure it, and search and classify images with words."""


@app.command(
    cls=RecipeCommand,
    epilog="Example: clipmini train demo --num_train_epochs 10 --output_dir runs/short",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    recipe: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE", help='A recipe: a name, such as "demo", or a YAML file.', autocompletion=complete_recipe
        ),
    ],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Run only this stage of the recipe.")] = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace the run in the output folder.")] = False,
    dry_run: Annotated[bool, _flag("--dry-run", "Show what would be run, on which data; write nothing.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from a recipe, and measure retrieval before and after.

    Each key of the recipe is an option too: --seed 7 is the same as --set seed=7.
    """
    from clipmini.data.recipe_files import parse_changes

    changes = parse_changes([*(overrides or []), *as_overrides(context.args)])
    if strict:
        changes["data.strict"] = True
    if dry_run:
        _show_plan(recipe, changes, overwrite, stage, as_json)
        return
    with working():
        run = clipmini.train(recipe, overwrite=overwrite, stage=stage, **changes)
        from accelerate import PartialState  # training has imported it

        if not PartialState().is_main_process:
            return  # of several processes, the first prints
    if as_json:
        print_json(run.to_dict())
        return
    print_contents(run.tables)
    typer.echo(f"The model is in {run.model_folder}")
    if run.example is not None:
        from clipmini.names import as_command

        ranked = ", whose image it ranks first there" if run.example.is_first else ""
        typer.echo(f"Try it with a caption of the {run.example.split} split{ranked}:")
        typer.echo(as_command("search", run.model_folder, run.example.folder, run.example.query))


@app.command(
    epilog="Example: clipmini teach openai/clip-vit-base-patch32 flickr8k --set source=FOLDER --out t.parquet"
)
def teach(
    model: AnyModelName,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The name or YAML file of the recipe whose pairs are embedded.")
    ],
    out: Annotated[Path, typer.Option(help="The parquet file to write.")],
    overrides: Overrides = None,
    logit_scale: Annotated[
        float | None,
        typer.Option(help="Factor on the teacher's similarities. Default: the one it learned."),
    ] = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed the training pairs of a recipe with a larger model, which it can then name as its `teacher`."""
    from clipmini.data.images import Skipped
    from clipmini.data.recipe_files import check_start, parse_changes, read_recipe
    from clipmini.names import locate_any_model

    locate_any_model(model)
    values = read_recipe(recipe, parse_changes(overrides or []))
    check_start(values)
    with working():
        from clipmini.inference.teacher import embed_with_teacher
        from clipmini.training.recipes import build_recipe
        from clipmini.training.run import load_recipe_pairs

        loaded = build_recipe(values)
        pairs = load_recipe_pairs(loaded, Skipped(strict=loaded.data.strict))["train"]
        embed_with_teacher(model, pairs, out, logit_scale=logit_scale, overwrite=overwrite)
    if as_json:
        print_json({"file": str(out), "num_images": len(pairs)})
    else:
        typer.echo(f"The embeddings of {len(pairs)} images and their captions are in {out}")


@app.command(epilog="Example: clipmini evaluate runs/demo/model demo --baseline openai/clip-vit-base-patch32")
def evaluate(
    model: AnyModelName,
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="For retrieval, image-caption pairs: a folder, a table, a Hub id, or a recipe with data. For "
            "zero-shot and probe, labeled images: a folder with one subfolder per class, or a Hub id.",
        ),
    ],
    task: Annotated[
        str, typer.Option(help="What to measure: retrieval, zero-shot or probe.", autocompletion=complete_task)
    ] = "retrieval",
    split: Annotated[str | None, typer.Option(help="Default: test, else validation, else train.")] = None,
    baseline: Annotated[str | None, typer.Option(help="Another model to compare with.")] = None,
    out: Annotated[Path | None, typer.Option(help="Report folder. Default: beside the model's, or in runs.")] = None,
    template: Template = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            help="The data that the model was trained on, to look for leaks; a recipe if its columns must be named. "
            "Default: the train split of DATA."
        ),
    ] = None,
    check_leaks: Annotated[
        bool, _flag("--check-leaks/--no-check-leaks", "Look for test data among the training data.")
    ] = True,
    overrides: Overrides = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace the report in the folder.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model, with confidence intervals, and write a report.

    The report is a folder with report.html, results.json, results.md and model-index.yaml.
    """
    from clipmini.data.recipe_files import parse_changes
    from clipmini.evaluation.request import check_folder

    changes = parse_changes(overrides or [])
    folder = (out and out.expanduser()) or _report_folder(model, data, task, split)
    check_folder(folder, overwrite)
    with working():
        evaluation = clipmini.evaluate(
            model,
            data,
            task,
            split=split,
            baseline=baseline,
            template=template,
            train_data=train_data,
            check_leaks=check_leaks,
            strict=strict,
            **changes,
        )
        evaluation.save(folder, overwrite=overwrite)
    for warning in evaluation.results["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    if as_json:
        print_json({**evaluation.to_dict(), "folder": str(folder)})
        return
    print_contents(evaluation.tables)
    typer.echo(f"The report is in {folder / 'report.html'}")


@app.command(epilog='Example: clipmini search runs/demo/model ~/Pictures "a red fish near coral" --out result.png')
def search(
    model: AnyModelName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The images to search, including subfolders.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What the images should show, in words.")],
    top: Annotated[int, typer.Option(help="How many images to find.")] = 9,
    out: Annotated[Path | None, typer.Option(help="Also draw the results: a .png, .jpg, .webp or .pdf file.")] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Find the images of a folder that best match a description."""
    from clipmini.files import check_drawing

    if out is not None:
        check_drawing(out)
    with working():
        hits = clipmini.search(model, folder, query, top, strict=strict)
    if as_json:
        print_json(hits.to_dict())
    else:
        rows = [(number, f"{hit.score:.3f}", hit.image) for number, hit in enumerate(hits, start=1)]
        print_table(("rank", "score", "image"), rows)
    if out is not None:
        from clipmini.inference.drawing import draw_results

        draw_results({query: hits}, out)
        typer.echo(f"The results are drawn in {out}", err=True)


@app.command(epilog='Example: clipmini classify runs/demo/model photo.jpg --labels "cat,dog"')
def classify(
    model: AnyModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="The image files to classify.")],
    labels: Annotated[str, typer.Option(help="What the images may show, separated by commas.")],
    template: Template = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Score how well each label fits each image, without training on the labels."""
    names = [label.strip() for label in labels.split(",")]
    with working():
        answer = clipmini.classify(model, images, names, template, strict=strict)
    if as_json:
        print_json(answer.to_dict())
        return
    rows: list[tuple[object, ...]] = []
    for item in answer:
        for index, found in enumerate(item.scores):
            rows.append(("" if index else item.image, found.label, f"{found.score:.1%}"))
        rows.append(())
    print_table(("image", "label", "score"), rows)


@app.command(epilog="Example: clipmini serve runs/demo/model --port 8000")
def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hub id.")],
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0 for any free one.")] = 8000,
    num_workers: Annotated[int, typer.Option("--workers", help="How many requests the model works on at once.")] = 2,
    max_body_mib: Annotated[int, typer.Option(help="The largest request accepted, in MiB.")] = 16,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest time for an answer, in seconds.")] = 60.0,
) -> None:
    """Answer Hugging Face's clients over HTTP: zero-shot image classification and feature extraction."""
    from clipmini.names import locate_model

    locate_model(model)
    try:
        from clipmini.inference.server import Limits, bind, create_app, run
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}, which is not installed: pip install 'clipmini[serve]'.") from None
    with working():
        from modeling_clipmini.handler import RequestHandler

        limits = Limits(
            max_body_bytes=max_body_mib * 2**20,
            max_active=max(Limits.max_active, 2 * num_workers),
            num_workers=num_workers,
            compute_timeout_s=timeout_s,
        )
        sock = bind(host, port)
        server = create_app(RequestHandler(clipmini.load(model)), limits)
    sock.listen()  # clients may connect from here on
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"Serving {model} at http://{address}:{sock.getsockname()[1]} until Ctrl-C")
    run(server, sock)


@app.command(epilog="Example: clipmini push runs/demo/model my-name/my-clip --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model folder that training saved.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The Hub repository, created if missing.")],
    private: Annotated[bool, _flag("--private", "Create the repository as private.")] = False,
    revision: Annotated[str | None, typer.Option(help="The branch, created if missing. Default: main.")] = None,
    message: Annotated[str | None, typer.Option(help="The commit message.")] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            "--example",
            metavar="IMAGE=LABEL,LABEL",
            help="An image to publish for the Hub's widget, with labels to choose from. May be repeated.",
        ),
    ] = None,
    samples: Annotated[
        bool, _flag("--samples", "Publish the run's samples.jpg, which holds images and captions of its data.")
    ] = False,
    allow_code_drift: Annotated[
        bool, _flag("--allow-code-drift", "Accept a folder whose code differs from the installed clipmini.")
    ] = False,
    dry_run: Annotated[bool, _flag("--dry-run", "List the files without uploading them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a trained model to the Hub in one commit, with its model card and results."""
    images = []
    for example in examples or []:
        image, separator, labels = example.rpartition("=")
        if not separator:
            raise ValueError(f"--example {example!r} is not of the form IMAGE=LABEL,LABEL.")
        images.append((image, [label.strip() for label in labels.split(",")]))
    with working():
        pushed = clipmini.push(
            folder,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            examples=images,
            samples=samples,
            allow_code_drift=allow_code_drift,
            dry_run=dry_run,
        )
    if as_json:
        print_json(pushed.to_dict())
        return
    print_table(("file", "bytes"), [(path, f"{size:,}") for path, size in pushed.sizes.items()])
    if pushed.left_out:
        typer.echo(f"Left out: {pushed.left_out.name}, an image of sample results; --samples shows it in the card.")
    if pushed.bank:
        typer.echo(
            f"bank.safetensors holds vectors of {pushed.bank['num_captions']:,} captions and "
            f"{pushed.bank['num_images']:,} images of the training data: who has one can test whether it is there."
        )
    if dry_run:
        typer.echo("Nothing was uploaded: this was a dry run.")
    else:
        typer.echo(f"{'The model is at' if pushed.is_new else 'The Hub already has all of it'}: {pushed.url}")


@app.command(epilog="Example: clipmini cache --clear --older-than 30")
def cache(
    clear: Annotated[bool, _flag("--clear", "Remove what is kept; no run may be computing it.")] = False,
    older_than_days: Annotated[
        float, typer.Option("--older-than", min=0, metavar="DAYS", help="Only what was not used for so many days.")
    ] = 0.0,
    as_json: AsJson = False,
) -> None:
    """List or remove what was computed from images and captions, and is kept for the next run."""
    from clipmini import store

    found = store.clear(older_than_days) if clear else store.spaces(older_than_days)
    if as_json:
        print_json({"removed" if clear else "kept": [{**vars(space), "folder": str(space.folder)} for space in found]})
        return
    rows = [
        (space.description, f"{space.num_rows:,}", f"{space.num_bytes:,}", f"{space.days_unused:.1f}")
        for space in found
    ]
    print_table(("removed" if clear else "kept", "rows", "bytes", "days since last use"), rows)


def _report_folder(model: str, data: str, task: str, split: str | None) -> Path:
    """Return a folder for each model, data, task and split: next to the model if it is a folder, else in runs."""
    parts = ["evaluation", *([] if task == "retrieval" else [task]), Path(data).stem, *filter(None, [split])]
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    path = Path(model)
    if path.is_dir():
        return path.absolute().parent / name
    return Path("runs") / re.sub(r"[^\w.-]+", "-", model) / name


def _show_plan(recipe: str, changes: dict[str, Any], overwrite: bool, stage: str | None, as_json: bool) -> None:
    """Print what a recipe would do."""
    from clipmini.data.recipe_files import check_start, read_recipe

    values = read_recipe(recipe, changes)
    check_start(values, stage)
    with working():
        from clipmini.training.recipes import build_recipe
        from clipmini.training.run import plan_run

        plan = plan_run(build_recipe(values), overwrite=overwrite, stage=stage)
    if as_json:
        print_json(plan)
        return
    typer.echo(yaml.safe_dump(plan["recipe"], sort_keys=False, allow_unicode=True))
    splits = plan["splits"].items()
    rows = [(name, f"{split['num_images']:,}", f"{split['num_captions']:,}") for name, split in splits]
    print_table(("split", "images", "captions"), rows)
    typer.echo(f"Inputs that would be skipped: {plan['num_skipped']}")
    typer.echo(f"The run would go to {plan['output_dir']}")
    for name, start in plan["start"].items():
        typer.echo(f"It {start}" if not name else f"Stage {name} {start}")


if __name__ == "__main__":
    main()
