"""The `clipmini` command: one thin function for each verb, over the functions of the package.

Results go to stdout, everything else (warnings, progress, errors) to stderr. Exit codes: 0 success, 1 a bug, 2 bad
input, 130 interrupted. Each verb imports what is slow to import by itself, so that `--help` is instant.
"""

import re
import socket
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    show,
    working,
)
from .names import ENGINES

if TYPE_CHECKING:
    from clipmini.inference.search import Hits

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
        show(f"clipmini {clipmini.__version__}")
        raise typer.Exit


AsJson = Annotated[bool, _flag("--json", "Print the results as JSON, with nothing else on stdout.")]
Strict = Annotated[bool, _flag("--strict", "Stop at the first image or caption that cannot be used.")]
AnyModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A model folder or Hub id, of clipmini, transformers (CLIP, SigLIP), sentence-transformers or open_clip; "
        "or open_clip:NAME/PRETRAINED.",
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        metavar="|".join(ENGINES),
        help="What computes the model: torch, by default, or what `clipmini export` wrote.",
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
            metavar="RECIPE | DATA",
            help='A recipe: a name, such as "demo", or a YAML file. With --model, also data to train that further on.',
            autocompletion=complete_recipe,
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
    from clipmini.recipe_files import parse_changes

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
    show(f"The model is in {run.model_folder}")
    if run.example is not None:
        from clipmini.names import as_command

        ranked = ", whose image it ranks first there" if run.example.is_first else ""
        show(f"Try it with a caption of the {run.example.split} split{ranked}:")
        show(as_command("search", run.model_folder, run.example.folder, run.example.query))


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
    from clipmini.names import locate_model
    from clipmini.recipe_files import check_start, parse_changes, read_recipe

    locate_model(model)
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
        show(f"The embeddings of {len(pairs)} images and their captions are in {out}")


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
    engine: Engine = "auto",
    overwrite: Annotated[bool, _flag("--overwrite", "Replace the report in the folder.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Measure a model, with confidence intervals, and write a report.

    The report is a folder with report.html, results.json, results.md and model-index.yaml.
    """
    from clipmini.evaluation.request import check_folder
    from clipmini.recipe_files import parse_changes

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
            engine=engine,
            strict=strict,
            **changes,
        )
        evaluation.save(folder, overwrite=overwrite)
    for warning in evaluation.results["warnings"]:
        show(f"warning: {warning}", err=True)
    if as_json:
        print_json({**evaluation.to_dict(), "folder": str(folder)})
        return
    print_contents(evaluation.tables)
    show(f"The report is in {folder / 'report.html'}")


@app.command(epilog="Example: clipmini convert openai/clip-vit-base-patch32 --out clip-b32")
def convert(
    name: Annotated[
        str,
        typer.Argument(
            metavar="NAME",
            help="A folder or Hub id, of transformers (CLIP, SigLIP), sentence-transformers or open_clip; or "
            "open_clip:NAME/PRETRAINED.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The model's new folder.")],
    as_json: AsJson = False,
) -> None:
    """Turn a CLIP of another library into a clipmini model that embeds the same.

    Only a folder to change or to publish needs this: wherever MODEL is asked for, such a name will do as it is.
    """
    with working():
        model = clipmini.convert(name, out)
    towers = {"vision": model.config.vision_config.architecture, "text": model.config.text_config.model_type}
    if as_json:
        print_json({"folder": str(out), **towers, "num_parameters": model.num_parameters()})
        return
    millions = f"{model.num_parameters() / 1e6:.1f} million"
    print_table(("part", "what it is"), [*towers.items(), ("parameters", millions)])
    show(f"The model is in {out}")


@app.command(epilog="Example: clipmini index runs/demo/model ~/Pictures --out pictures.index")
def index(
    model: AnyModelName,
    sources: Annotated[
        list[str],
        typer.Argument(metavar="SOURCE", help="Images: folders with their subfolders, tables, data sets, Hub ids."),
    ],
    out: Annotated[str, typer.Option(metavar="INDEX", help="The index: a new folder, or one to bring up to date.")],
    engine: Engine = "auto",
    ray: Annotated[bool, _flag("--ray", "Embed on the Ray cluster of RAY_ADDRESS, not on this machine.")] = False,
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Embed images once, and keep their vectors for searching; run it again to bring them up to date.

    Only new and changed images are embedded, and those that are gone from a source are dropped. A run that is killed
    goes on where it was.
    """
    from clipmini.names import as_command, locate, locate_model

    locate_model(model)
    for source in () if ray else sources:  # Ray also reads addresses
        locate(source, "a folder or a table of images", "dataset")
    with working():
        changes = clipmini.open_index(out, model, engine=engine).add(*sources, strict=strict, ray=ray)
    if as_json:
        print_json({**changes.to_dict(), "index": out})
        return
    rows = [
        (name.removeprefix("num_"), f"{number:,}")
        for name, number in changes.to_dict().items()
        if isinstance(number, int)
    ]
    print_table(("images", "number"), rows)
    command = as_command("search", out, options=[] if engine == "auto" else ["--engine", engine])
    show(f"The index is in {out}; search it with: {command} WORDS")


@app.command(
    epilog='Example: clipmini search runs/demo/model ~/Pictures "a red fish near coral" --out result.png, or, in an '
    'index, clipmini search pictures.index "a dog" image:dog.jpg --minus "a beach"'
)
def search(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL FOLDER | INDEX", help="Where to search: a model and a folder, or an index."),
    ],
    words: Annotated[
        list[str],
        typer.Argument(metavar="QUERY", help="What the images should show, in words; or image:PATH. May be several."),
    ],
    plus: Annotated[
        list[str] | None, typer.Option(metavar="TERM", help="Words or image:PATH to add. May be repeated.")
    ] = None,
    minus: Annotated[
        list[str] | None, typer.Option(metavar="TERM", help="Words or image:PATH to subtract. May be repeated.")
    ] = None,
    top: Annotated[int, typer.Option(help="How many images to find for each query.")] = 9,
    where: Annotated[
        str | None, typer.Option(metavar="SQL", help="A condition: \"width > 1000 and date >= '2024-01-01'\".")
    ] = None,
    collapse: Annotated[bool, _flag("--collapse", "Of near-copies, show the best alone.")] = False,
    moved: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Where the model of the index has moved to.")
    ] = None,
    use_index: Annotated[
        bool, _flag("--index/--no-index", "Keep the vectors of FOLDER in the cache for the next search.")
    ] = True,
    out: Annotated[Path | None, typer.Option(help="Also draw the results: a .png, .jpg, .webp or .pdf file.")] = None,
    is_opened: Annotated[bool, _flag("--open", "Show the drawing; without --out, in a temporary file.")] = False,
    engine: Engine = "auto",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Find the images that best match a description, in a folder or in an index.

    MODEL may be of clipmini, transformers, sentence-transformers or open_clip. The first search in a folder embeds all
    of its images; with lancedb installed, later ones embed only those that are new.
    """
    from clipmini.files import check_drawing
    from clipmini.names import is_index

    if out is not None:
        check_drawing(out)
    terms: dict[str, Any] = {
        "top": top,
        "plus": plus or [],
        "minus": minus or [],
        "where": where,
        "collapse": collapse,
    }
    if is_index(model):
        if strict or not use_index:
            raise ValueError(f"{'--strict' if strict else '--no-index'} is for a folder, and {model} is an index.")
        with working():
            found = clipmini.open_index(model, moved, engine=engine).search(*words, **terms)
    else:
        if moved is not None:
            raise ValueError(f"--model {moved} cannot be used: it is for an index, and {model} is no index.")
        folder, *queries = words
        if not queries:
            raise ValueError(f"QUERY is missing: write what to look for in {folder}; or name an index alone.")
        with working():
            terms |= {"use_index": use_index, "engine": engine, "strict": strict}
            found = clipmini.search_each(model, folder, queries, **terms)
    if as_json:
        print_json(found[0].to_dict() if len(found) == 1 else [hits.to_dict() for hits in found])
    else:
        _print_hits(found)
    if out is None and is_opened:
        out = Path(tempfile.mkdtemp(prefix="clipmini-")) / "search.png"
    if out is not None:
        from clipmini.inference.drawing import draw_results

        draw_results({hits.query: hits for hits in found}, out)
        show(f"The results are drawn in {out}", err=True)
        if is_opened:
            typer.launch(str(out))


def _print_hits(found: "Sequence[Hits]") -> None:
    for hits in found:
        if len(found) > 1:
            show(hits.query)
        rows = [(number, f"{hit.score:.3f}", hit.path) for number, hit in enumerate(hits, start=1)]
        print_table(("rank", "score", "image"), rows)


@app.command(epilog='Example: clipmini classify runs/demo/model photo.jpg --labels "cat,dog"')
def classify(
    model: AnyModelName,
    images: Annotated[list[str], typer.Argument(metavar="IMAGE", help="The image files to classify.")],
    labels: Annotated[
        list[str],
        typer.Option(
            help="What the images may show, separated by commas; or a file with a label a line. Given several times, "
            "each is one label and may have commas."
        ),
    ],
    template: Template = None,
    engine: Engine = "auto",
    strict: Strict = False,
    as_json: AsJson = False,
) -> None:
    """Score how well each label fits each image, without training on the labels."""
    from clipmini.inference.prompts import read_labels

    names = read_labels(labels)
    with working():
        answer = clipmini.classify(model, images, names, template, engine=engine, strict=strict)
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
    engine: Engine = "auto",
) -> None:
    """Answer Hugging Face's clients over HTTP: zero-shot image classification and feature extraction."""
    from clipmini.names import locate_model

    locate_model(model, engine)
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
        server = create_app(RequestHandler(clipmini.load(model, engine=engine), num_workers), limits)
    sock.listen()  # clients may connect from here on
    show(f"Serving {model} at {_address(host, sock)} until Ctrl-C")
    run(server, sock)


@app.command("app", epilog="Example: clipmini app runs/demo/model --index ~/Pictures")
def run_app(
    model: AnyModelName,
    index: Annotated[
        str | None, typer.Option(help="What to search: an index, or a folder of images, which is indexed first.")
    ] = None,
    host: Annotated[str, typer.Option(help="The address to listen at; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen at; 0 for any free one.")] = 7860,
) -> None:
    """Open a page to search images and to label them, for a browser on this machine.

    Nothing is sent elsewhere. Whoever reaches the page sees small copies of all images of the index.
    """
    from clipmini.data.images import find_images
    from clipmini.names import expand, is_index, locate_model

    locate_model(model)
    if index is not None and not is_index(index):
        find_images(index)  # raises an error if it is no folder of images either
    try:
        from clipmini.indexing.app import Page, serve
        from clipmini.inference.server import bind
    except ModuleNotFoundError as error:
        raise ValueError(f"app needs {error.name}, which is not installed: pip install 'clipmini[app]'.") from None
    sock = bind(host, port)
    with working():
        from clipmini.indexing.find import open_kept_index
        from clipmini.inference.encoders import load_encoder

        if index is None:
            page = Page(load_encoder(model))
        else:
            images = (
                clipmini.open_index(index, model) if is_index(index) else open_kept_index(model, Path(expand(index)))
            )
            page = Page(images.encoder, images)
    sock.listen()  # browsers may connect from here on
    show(f"Open {_address(host, sock)} in a browser; Ctrl-C ends the page")
    serve(page, model, sock)


@app.command(epilog="Example: clipmini export runs/demo/model --to onnx --pairs offline:photos/test")
def export(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="A model folder or a Hub id.")],
    to: Annotated[str, typer.Option(metavar="onnx", help="The format.")],
    int8: Annotated[
        bool, _flag("--int8", "Also export graphs of 8 bits: of the text half, and with --calibration of both.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="A folder for the graphs and all that they need. Default: MODEL/onnx."),
    ] = None,
    pairs: Annotated[
        str | None,
        typer.Option(metavar="DATA", help="Image-caption pairs to measure recall on, 500 images or more."),
    ] = None,
    split: Annotated[str | None, typer.Option(help="Of the pairs. Default: as in evaluate.")] = None,
    calibration: Annotated[
        str | None,
        typer.Option(metavar="IMAGES", help="A folder of images such as the model will see, for its int8 image half."),
    ] = None,
    force: Annotated[bool, _flag("--force", "Keep graphs that lose more than a point of recall at 1.")] = False,
    as_json: AsJson = False,
) -> None:
    """Export both halves of a model as ONNX graphs, and compare their size, speed and recall with the original's."""
    if to != "onnx":
        raise ValueError(f"--to {to} is not allowed; the only format is onnx.")
    with working():
        exported = clipmini.export(
            model, out, int8=int8, pairs=pairs, split=split, calibration=calibration, force=force
        )
    if as_json:
        print_json(exported.to_dict())
        return
    print_contents(exported.tables)
    show(f"The graphs are in {exported.folder}")


@app.command(
    epilog="Example: clipmini interpolate openai/clip-vit-base-patch32 runs/fine-tune/model --keep my_classes"
)
def interpolate(
    start: Annotated[str, typer.Argument(metavar="START", help="The folder or Hub id of a model.")],
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="A model that was trained from it.")],
    data: Annotated[str | None, typer.Option(help="The new data. Default: those of TUNED's run.")] = None,
    keep: Annotated[
        str | None,
        typer.Option(
            metavar="DATA",
            help="Where the model must not get worse: pairs, or labeled images. Default: what TUNED's run kept.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="A new folder. Default: beside TUNED's run.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure the models on the line between two, and save the best that is not surely worse than START elsewhere.

    The folder is like a run's: it also holds results.json, and the curve as curves.png.
    """
    with working():
        chosen = clipmini.interpolate(start, tuned, out, data=data, keep=keep)
    if as_json:
        print_json(chosen.to_dict())
        return
    print_contents(chosen.tables)
    weight = chosen.results["interpolation"]["weight"]
    show(f"{weight:g} of {tuned} and {1 - weight:g} of {start} are the model in {chosen.model_folder}")
    show(f"The curve is in {chosen.curves}")


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
    space: Annotated[
        bool, _flag("--space", "Also make a Space of this name: a page that runs the exported model in browsers.")
    ] = False,
    allow_code_drift: Annotated[
        bool, _flag("--allow-code-drift", "Accept a folder whose code differs from the installed clipmini.")
    ] = False,
    dry_run: Annotated[bool, _flag("--dry-run", "List the files without uploading them.")] = False,
    as_json: AsJson = False,
) -> None:
    """Upload a trained model to the Hub in one commit, with its model card and results."""
    from clipmini.inference.prompts import split_labels

    images = []
    for example in examples or []:
        image, separator, labels = example.rpartition("=")
        if not separator:
            raise ValueError(f"--example {example!r} is not of the form IMAGE=LABEL,LABEL.")
        images.append((image, split_labels(labels)))
    with working():
        pushed = clipmini.push(
            folder,
            repo_id,
            private=private,
            revision=revision,
            message=message,
            examples=images,
            samples=samples,
            space=space,
            allow_code_drift=allow_code_drift,
            dry_run=dry_run,
        )
    if as_json:
        print_json(pushed.to_dict())
        return
    print_table(("file", "bytes"), [(path, f"{size:,}") for path, size in pushed.sizes.items()])
    if pushed.space:
        print_table(("file of the Space", "bytes"), [(path, f"{size:,}") for path, size in pushed.space.sizes.items()])
    if pushed.left_out:
        show(f"Left out: {pushed.left_out.name}, an image of sample results; --samples shows it in the card.")
    if pushed.bank:
        show(
            f"bank.safetensors holds vectors of {pushed.bank['num_captions']:,} captions and "
            f"{pushed.bank['num_images']:,} images of the training data: who has one can test whether it is there."
        )
    if dry_run:
        show("Nothing was uploaded: this was a dry run.")
    else:
        show(f"{'The model is at' if pushed.is_new else 'The Hub already has all of it'}: {pushed.url}")
        if pushed.space:
            show(f"{'Its page is at' if pushed.space.is_new else 'Its page is as before'}: {pushed.space.url}")


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


def _address(host: str, sock: socket.socket) -> str:
    return f"http://{f'[{host}]' if ':' in host else host}:{sock.getsockname()[1]}"


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
    from clipmini.recipe_files import check_start, read_recipe

    values = read_recipe(recipe, changes)
    check_start(values, stage)
    with working():
        from clipmini.training.recipes import build_recipe
        from clipmini.training.run import plan_run

        plan = plan_run(build_recipe(values), overwrite=overwrite, stage=stage)
    if as_json:
        print_json(plan)
        return
    show(*yaml.safe_dump(plan["recipe"], sort_keys=False, allow_unicode=True).splitlines())
    splits = plan["splits"].items()
    rows = [(name, f"{split['num_images']:,}", f"{split['num_captions']:,}") for name, split in splits]
    print_table(("split", "images", "captions"), rows)
    show(f"Inputs that would be skipped: {plan['num_skipped']}")
    show(f"The run would go to {plan['output_dir']}")
    for name, start in plan["start"].items():
        show(f"It {start}" if not name else f"Stage {name} {start}")


if __name__ == "__main__":
    main()
