"""The `clipmini` command: one thin function per verb.

Results go to stdout, everything else (warnings, progress, errors) to stderr. Exit codes: 0 success, 1 a bug, 2 bad
input, 130 interrupted. What is slow to import is imported by the verb that needs it, so that `--help` is instant.
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
Template = Annotated[
    str | None,
    typer.Option(
        "--template",
        help="The caption made of a label, which stands in place of {}; or a list: imagenet, simple, a file.",
        show_default="a photo of a {}.",
    ),
]
ModelName = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, or a Hub id.")]


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of every error.")] = False,
) -> None:
    """Train your own small CLIP, and use it to search and classify images with words."""


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
    from clipmini.training.run import train as run_recipe

    changes = [*(overrides or []), *as_overrides(context.args)]
    with working():
        loaded = load_recipe(recipe, [*changes, *(["data.strict=true"] if strict else [])])
        result = run_recipe(loaded, overwrite=overwrite, stage=stage)
    if loaded.training.process_index > 0:
        return  # one of several processes tells
    if as_json:
        places = {"model_dir": str(result.model_dir), "output_dir": str(result.output_dir)}
        print_json({**result.results, **places})
        return
    for name, split in result.results["splits"].items():
        typer.echo(f"{name}: {split['num_images']} images, {split['num_captions']} captions; recall in percent")
        print_table(_recall_table(split))
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
    logit_scale: Annotated[
        float | None,
        typer.Option("--logit-scale", help="Scale its similarities by this; by default by what it was trained with."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file.")] = False,
    as_json: AsJson = False,
) -> None:
    """Embed a recipe's training pairs with a larger image-text model, for `train --teacher FILE` to learn from."""
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
        typer.echo(f"{len(pairs)} images and their captions are in {out}")


@app.command(epilog='Example: clipmini search runs/demo/model ~/Images "a red fish near coral" --out result.png')
def search(
    model: ModelName,
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Images, in sub-folders too.")],
    query: Annotated[str, typer.Argument(metavar="QUERY", help="What the image should show, in words.")],
    top: Annotated[int, typer.Option("--top", help="How many images to give.")] = 9,
    out: Annotated[Path | None, typer.Option("--out", help="Draw the results as an image, such as x.png.")] = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Find the images of a folder that fit a description."""
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
        typer.echo(f"drawn in {out}", err=True)


@app.command(epilog='Example: clipmini classify runs/demo/model photo.jpg --labels "cat,dog"')
def classify(
    model: ModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="Image files.")],
    labels: Annotated[str, typer.Option("--labels", help="What they may show, with commas between.")],
    template: Template = None,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Say which of some labels fits each image best; no training on them is needed."""
    from clipmini.data.images import Skipped
    from clipmini.inference.encode import load_model
    from clipmini.inference.zero_shot import DEFAULT_TEMPLATE, classify_files, fill_template, load_templates

    template = template or DEFAULT_TEMPLATE
    names = [label.strip() for label in labels.split(",")]
    skipped = Skipped(strict)
    with working():
        templates = load_templates(template)
        fill_template(names, templates[0])  # before anything is loaded
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


@app.command(epilog="Example: clipmini push runs/demo/model my-name/my-clip --dry-run")
def push(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="The model's, as training saved it.")],
    repo_id: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository; it is made if need be.")],
    private: Annotated[bool, typer.Option("--private", help="Let only the owner see it.")] = False,
    revision: Annotated[str | None, typer.Option("--revision", help="The branch; it is made if need be.")] = None,
    message: Annotated[str | None, typer.Option("--message", help="The commit's message.")] = None,
    examples: Annotated[
        list[str] | None,
        typer.Option(
            "--example",
            metavar="IMAGE=LABEL,LABEL",
            help="An image that may be published, for the Hub's widget; repeatable.",
        ),
    ] = None,
    allow_code_drift: Annotated[
        bool, typer.Option("--allow-code-drift", help="Take a folder whose code is not this clipmini's.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="List the files and upload nothing.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a trained model to the Hub, card and results with it, in one commit."""
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
        done = {} if pushed is None else {"commit": pushed.commit.oid, "is_new": pushed.is_new, "url": pushed.url}
        print_json({"repo_id": repo_id, "files": files, **done})
        return
    table = Table("file", "bytes")
    for path, size in prepared.sizes.items():
        table.add_row(visible(path), f"{size:,}")
    print_table(table)
    if pushed is None:
        typer.echo("Nothing was uploaded: this was a dry run.")
    else:
        typer.echo(f"{'The model is' if pushed.is_new else 'All of it was there already'}: {pushed.url}")


@app.command(epilog="Example: clipmini evaluate runs/demo/model demo")
def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A model folder or Hub id of clipmini, transformers (CLIP, SigLIP) or sentence-transformers; or "
            "open_clip:NAME/PRETRAINED.",
        ),
    ],
    data: Annotated[
        str,
        typer.Argument(
            metavar="DATA",
            help="Pairs: a folder, a table, a Hub id, or a recipe, whose data is taken. For zero-shot and probe, "
            "labeled images: a folder with a sub-folder for each class, or a Hub id.",
        ),
    ],
    task: Annotated[str, typer.Option("--task", help="retrieval, zero-shot or probe.")] = "retrieval",
    split: Annotated[str | None, typer.Option("--split", help="Default: test, else validation, else train.")] = None,
    baseline: Annotated[str | None, typer.Option("--baseline", help="Another model, to compare with.")] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for the report; by default beside the model, or in runs.")
    ] = None,
    template: Template = None,
    train_data: Annotated[
        str | None,
        typer.Option(
            "--train-data",
            help="What the model was trained on, to look for leaks; a recipe, if columns must be named. "
            "Default: DATA's train.",
        ),
    ] = None,
    check_leaks: Annotated[bool, typer.Option(help="Look for what stands in the training data too.")] = True,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a key of the data; repeatable.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the report in the folder.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model, with intervals, and write a report: results.json, results.md, model-index.yaml, report.html."""
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
    for warning in evaluation.warnings:
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


@app.command(epilog="Example: clipmini serve runs/demo/model --port 8000")
def serve(
    model: ModelName,
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 for any that is free.")] = 8000,
    num_workers: Annotated[int, typer.Option("--workers", help="Requests that the model works on at once.")] = 2,
    max_body_mib: Annotated[int, typer.Option("--max-body-mib", help="Largest request taken, in MiB.")] = 16,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds an answer may take.")] = 60.0,
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
    sock.listen()  # from here on clients may come
    address = f"[{host}]" if ":" in host else host
    typer.echo(f"Serving {model} at http://{address}:{sock.getsockname()[1]} until Ctrl-C")
    run(server, sock)


def _report_folder(model: str, data: str, task: str, split: str | None) -> Path:
    """Name a folder for each model, data, task and split, beside a model that is a folder here."""
    parts = ["evaluation", *([] if task == "retrieval" else [task]), Path(data).stem, *filter(None, [split])]
    name = re.sub(r"[^\w.-]+", "-", "-".join(parts))
    path = Path(model)
    if path.is_dir():
        return path.absolute().parent / name
    return Path("runs") / re.sub(r"[^\w.-]+", "-", model) / name


def _folder_to_search(source: str) -> str:
    """Name the folder that was trained on where it holds images, as one with only tables does not."""
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
