"""The `clipmini` command: one thin function for each verb.

Results go to stdout, everything else (warnings, progress, errors) to stderr. Exit codes: 0 success, 1 a bug, 2 bad
input, 130 interrupted. Each verb imports what is slow to import by itself, so that `--help` is instant.
"""

import re
import shlex
import sys
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from .console import Commands, as_overrides, print_json, print_table, skipped_as_json, visible, working

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command; the entry point of the console script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # file names need not be text, nor terminals UTF-8
    app(prog_name="clipmini")


def _flag(name: str, help: str, **options: Any) -> Any:
    """Return a typer option without a value, and without the "<bool>" that typer's help would show for one."""
    return typer.Option(name, help=help, metavar="", **options)


def _print_version(is_wanted: bool) -> None:
    if is_wanted:
        typer.echo(f"clipmini {installed_version('clipmini')}")
        raise typer.Exit


AsJson = Annotated[bool, _flag("--json", "Print the results as JSON, with nothing else on stdout.")]
Strict = Annotated[bool, _flag("--strict", "Stop at the first image or caption that cannot be used.")]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hub id.")]
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
        'YAML file. Default: "a photo of a {}."',
    ),
]


@app.callback()
def options(
    version: Annotated[bool, _flag("--version", "Print the version.", callback=_print_version, is_eager=True)] = False,
    debug: Annotated[bool, _flag("--debug", "Print the traceback of every error.")] = False,
) -> None:
    """Train your own small CLIP, measure it, and search and classify images with words."""


@app.command(
    epilog="Example: clipmini train demo --num_train_epochs 10 --output_dir runs/short",
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(
    context: typer.Context,
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help='A recipe: a name, such as "demo", or a YAML file.')],
    overrides: Overrides = None,
    stage: Annotated[str | None, typer.Option(help="Run only this stage of the recipe.")] = None,
    overwrite: Annotated[bool, _flag("--overwrite", "Replace the run in the output folder.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Train a model from a recipe, and measure retrieval before and after.

    Each key of the recipe is an option too: --seed 7 is the same as --set seed=7.
    """
    from clipmini.training.recipes import load_recipe
    from clipmini.training.run import train as run_recipe

    changes = [*(overrides or []), *as_overrides(context.args)]
    with working():
        loaded = load_recipe(recipe, [*changes, *(["data.strict=true"] if strict else [])])
        result = run_recipe(loaded, overwrite=overwrite, stage=stage)
    if loaded.training.process_index > 0:
        return  # of several processes, the first prints
    if as_json:
        folders = {"model_dir": str(result.model_dir), "output_dir": str(result.output_dir)}
        print_json({**result.results, **folders})
        return
    for name, split in result.results["splits"].items():
        typer.echo(f"{name}: {split['num_images']} images, {split['num_captions']} captions; recall in percent")
        print_table(_recall_table(split))
    folder = shlex.quote(_folder_to_search(loaded.data.source))
    typer.echo(f"The model is in {result.model_dir}")
    typer.echo(f'Try it: clipmini search {shlex.quote(str(result.model_dir))} {folder} "a dog on a beach"')


@app.command(epilog="Example: clipmini teach openai/clip-vit-base-patch32 flickr8k --out teacher.parquet")
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
    from clipmini.inference.teacher import embed_with_teacher
    from clipmini.training.recipes import load_recipe
    from clipmini.training.run import load_recipe_pairs

    with working():
        loaded = load_recipe(recipe, overrides or [])
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
    task: Annotated[str, typer.Option(help="What to measure: retrieval, zero-shot or probe.")] = "retrieval",
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
    from clipmini.data.images import Skipped
    from clipmini.evaluation.report import evaluate as run_evaluation
    from clipmini.evaluation.results import check_folder

    folder = out or _report_folder(model, data, task, split)
    skipped = Skipped(strict)
    with working():
        check_folder(folder, overwrite)
        evaluation = run_evaluation(
            model,
            data,
            task,
            split=split,
            baseline=baseline,
            template=template,
            train_data=train_data,
            check_leaks=check_leaks,
            overrides=overrides or [],
            skipped=skipped,
        )
        evaluation.save(folder, overwrite=overwrite)
    for warning in evaluation.results["warnings"]:
        typer.echo(f"warning: {warning}", err=True)
    skipped.log_summary()
    if as_json:
        print_json({**evaluation.results, **skipped_as_json(skipped), "folder": str(folder)})
        return
    for content in evaluation.tables:
        typer.echo(f"{content.title}. {content.note}" if content.note else content.title)
        if content.columns:
            table = Table(*content.columns)
            for row in content.rows:
                table.add_row(*map(visible, row))
            print_table(table)
    typer.echo(f"The report is in {folder / 'report.html'}")


@app.command(epilog='Example: clipmini search runs/demo/model ~/Pictures "a red fish near coral" --out result.png')
def search(
    model: ModelName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="The images to search, including subfolders.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What the images should show, in words.")],
    top: Annotated[int, typer.Option(help="How many images to find.")] = 9,
    out: Annotated[Path | None, typer.Option(help="Also draw the results: a .png, .jpg, .webp or .pdf file.")] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Find the images of a folder that best match a description."""
    from clipmini.data.images import Skipped
    from clipmini.inference.encode import load_model
    from clipmini.inference.search import check_search, draw_results, search_folder

    skipped = Skipped(strict)
    with working():
        check_search(query, top, out)
        hits = search_folder(*load_model(model), folder, query, top, skipped)
    if as_json:
        found = [{"path": str(hit.path), "score": hit.score} for hit in hits]
        print_json({"query": query, "hits": found, **skipped_as_json(skipped)})
    else:
        table = Table("rank", "score", "image")
        for number, hit in enumerate(hits, start=1):
            table.add_row(str(number), f"{hit.score:.3f}", visible(hit.path))
        print_table(table)
    skipped.log_summary()
    if out is not None:
        draw_results({query: hits}, out)
        typer.echo(f"The results are drawn in {out}", err=True)


@app.command(epilog='Example: clipmini classify runs/demo/model photo.jpg --labels "cat,dog"')
def classify(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="The image files to classify.")],
    labels: Annotated[str, typer.Option(help="What the images may show, separated by commas.")],
    template: Template = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Score how well each label fits each image, without training on the labels."""
    from clipmini.data.images import Skipped
    from clipmini.inference.encode import load_model
    from clipmini.inference.zero_shot import DEFAULT_TEMPLATE, classify_files, fill_template, load_templates

    template = template or DEFAULT_TEMPLATE
    names = [label.strip() for label in labels.split(",")]
    skipped = Skipped(strict)
    with working():
        templates = load_templates(template)
        fill_template(names, templates[0])  # checks the labels before anything is loaded
        results = classify_files(*load_model(model), images, names, templates, skipped)
    if as_json:
        found = [{"path": str(path), "scores": [vars(item) for item in scores]} for path, scores in results]
        print_json({"template": template, "results": found, **skipped_as_json(skipped)})
    else:
        table = Table("image", "label", "score")
        for path, scores in results:
            for index, item in enumerate(scores):
                table.add_row("" if index else visible(path), visible(item.label), f"{item.score:.1%}")
            table.add_section()
        print_table(table)
    skipped.log_summary()


@app.command(epilog="Example: clipmini serve runs/demo/model --port 8000")
def serve(
    model: ModelName,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0 for any free one.")] = 8000,
    num_workers: Annotated[int, typer.Option("--workers", help="How many requests the model works on at once.")] = 2,
    max_body_mib: Annotated[int, typer.Option(help="The largest request accepted, in MiB.")] = 16,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Longest time for an answer, in seconds.")] = 60.0,
) -> None:
    """Answer Hugging Face's clients over HTTP: zero-shot image classification and feature extraction."""
    try:
        from clipmini.inference.server import Limits, bind, create_app, run
    except ModuleNotFoundError as error:
        raise ValueError(f"serve needs {error.name}, which is not installed: pip install 'clipmini[serve]'.") from None
    from clipmini.inference.encode import load_model
    from modeling_clipmini.handler import RequestHandler

    with working():
        limits = Limits(
            max_body_bytes=max_body_mib * 2**20,
            max_active=max(Limits.max_active, 2 * num_workers),
            num_workers=num_workers,
            compute_timeout_s=timeout_s,
        )
        sock = bind(host, port)
        server = create_app(RequestHandler(*load_model(model)), limits)
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
    allow_code_drift: Annotated[
        bool, _flag("--allow-code-drift", "Accept a folder whose code differs from the installed clipmini.")
    ] = False,
    dry_run: Annotated[bool, _flag("--dry-run", "List the files without uploading them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a trained model to the Hub in one commit, with its model card and results."""
    from clipmini.publishing.push import prepare_push, read_example
    from clipmini.publishing.push import push as upload

    with working():
        images = [read_example(example) for example in examples or []]
        prepared = prepare_push(folder, repo_id, allow_code_drift=allow_code_drift, examples=images)
        pushed = None
        if not dry_run:
            pushed = upload(prepared, private=private or None, revision=revision, message=message)
    if as_json:
        files = [{"path": path, "size": size} for path, size in prepared.sizes.items()]
        commit = {} if pushed is None else {"commit": pushed.commit.oid, "is_new": pushed.is_new, "url": pushed.url}
        print_json({"repo_id": repo_id, "files": files, **commit})
        return
    table = Table("file", "bytes")
    for path, size in prepared.sizes.items():
        table.add_row(visible(path), f"{size:,}")
    print_table(table)
    if pushed is None:
        typer.echo("Nothing was uploaded: this was a dry run.")
    else:
        typer.echo(f"{'The model is at' if pushed.is_new else 'The Hub already has all of it'}: {pushed.url}")


def _report_folder(model: str, data: str, task: str, split: str | None) -> Path:
    """Return a folder for each model, data, task and split: next to the model if it is a folder, else in runs."""
    parts = ["evaluation", *([] if task == "retrieval" else [task]), Path(data).stem, *filter(None, [split])]
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    path = Path(model)
    if path.is_dir():
        return path.absolute().parent / name
    return Path("runs") / re.sub(r"[^\w.-]+", "-", model) / name


def _folder_to_search(source: str) -> str:
    """Return the folder that was trained on, or the word FOLDER if it holds no images but only tables."""
    from clipmini.data.images import find_images

    try:
        find_images(source)
    except ValueError:
        return "FOLDER"
    return source


def _recall_table(split: dict[str, Any]) -> Table:
    from clipmini.evaluation.naming import METRIC_LABELS

    table = Table("")
    columns = ("chance", "before", "after")
    for column in columns:
        table.add_column(column, justify="right")
    for key in split["chance"]:
        table.add_row(METRIC_LABELS[key], *(f"{100 * split[column][key]:.1f}" for column in columns))
    return table


if __name__ == "__main__":
    main()
