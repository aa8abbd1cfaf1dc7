"""Every block of bash and Python on a page: run as a reader would, in the order of the page."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest
import typer.main
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from PIL import Image

from clipmini.cli import app
from clipmini.console import as_overrides
from clipmini.recipe_files import parse_changes, preset_names, read_recipe
from hub_repositories import Commit, File, Repository, goes_through_lfs
from loopback_hub import running_hub
from pages import NOTEBOOKS, PAGES, ROOT, clipmini_commands, links_in, notebook_blocks, page_blocks

BLOCKS = [block for page in PAGES for block in page_blocks(page)]
COMMANDS = [
    (block.name, arguments)
    for block in [*BLOCKS, *(block for notebook in NOTEBOOKS for block in notebook_blocks(notebook))]
    if block.language == "bash"
    for arguments in clipmini_commands(block.code)
]
HELP = [(verb, command.epilog) for verb, command in typer.main.get_command(app).commands.items() if command.epilog]
COMMANDS += [(f"{verb} --help", arguments) for verb, text in HELP for arguments in clipmini_commands(text)]
MAX_NOT_RUN = 4

# The world of a reader, so that a page needs nothing but this machine. A page that needs more adds a line here.
# What stands on a page, and what is run instead; {port} is a free one.
REPLACED = {
    "8000": "{port}",
    "--index photos.index": "--index photos.index --port {port}",
    "https://example.org/other.jpg": "my_images/2.jpg",
    "runs/flickr8k/model": "runs/demo/model",
    "FOLDER": "my_images",
}
# Programs that install, download or do not return, and the lines of sh that stand in for them. They fail if they are
# called in a way that they do not know. $REAL is the folder of the real ones, $PAGE that in which the page is run.
STAND_INS = {
    "pip": '[ "$1" = install ]',
    "uv": '[ "$1" = pip ] || [ "$1" = venv ] || [ "$1" = sync ]',
    "git": '[ "$1" = clone ] && ln -sfn "$PAGE" "$(basename "$2" .git)"',
    "hf": '[ "$*" = "auth login" ]',
    "python3": """
if [ "$1 $2" = "-m venv" ]; then mkdir -p "$3/bin" && touch "$3/bin/activate"; else exec "$REAL/python" "$@"; fi""",
    "make": """
for target; do
    grep -q "^$target:" Makefile
    if [ "$target" = demo ]; then "$REAL/clipmini" train demo --overwrite && "$REAL/python" examples/demo.py; fi
done""",
    "clipmini": """
if [ "$1" != serve ] && [ "$1" != app ]; then exec "$REAL/clipmini" "$@"; fi
"$REAL/clipmini" "$@" >serve.log 2>&1 &
echo $! >>"$PAGE/started"
until grep -q "^Serving\\|^Open" serve.log; do kill -0 $! && sleep 0.2; done""",
}
PEERS = ("openai/clip-vit-base-patch32",)  # models on the Hub of this test: tiny ones
OWNER = "my-name"  # who is logged in there


def lay_out(folder):
    """Make what a reader has who stands in a clone, with images of their own."""
    for name in ("examples", "configuration"):
        shutil.copytree(ROOT / name, folder / name)
    for name in ("Makefile", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    (folder / "my_images").mkdir()
    lines = (ROOT / "examples/photos/train/metadata.jsonl").read_text(encoding="utf-8").splitlines()
    rows = ["file_name,caption"]
    for number, line in enumerate(lines[::3], start=1):
        photo = json.loads(line)
        name, label = f"{number}.jpg", "fish" if "fish" in photo["caption"] else "other"
        (folder / "classes" / label).mkdir(parents=True, exist_ok=True)
        with Image.open(ROOT / "examples/photos/train" / photo["file_name"]) as image:
            image.convert("RGB").save(folder / "my_images" / name)
        shutil.copy(folder / "my_images" / name, folder / "classes" / label / name)
        rows.append(f'{name},"{photo["caption"]}"')
    (folder / "my_images" / "metadata.csv").write_text("\n".join(rows))
    (folder / "captions.csv").write_text("\n".join([rows[0], *(f"my_images/{row}" for row in rows[1:])]))
    for name in ("photo.jpg", "image.jpg", "cat.jpg"):
        shutil.copy(folder / "my_images" / "1.jpg", folder / name)


@pytest.fixture
def world(tmp_path, clip_folder):
    """A folder for a page, and the environment in which it is run."""
    page, stand_ins = tmp_path / "page", tmp_path / "bin"
    page.mkdir()
    stand_ins.mkdir()
    lay_out(page)
    for name, lines in STAND_INS.items():
        (stand_ins / name).write_text(f"#!/bin/sh -e\n{lines}\n")
        (stand_ins / name).chmod(0o755)
    with running_hub() as hub:
        hub.user = OWNER
        for name in PEERS:
            paths = [path for path in Path(clip_folder).iterdir() if path.is_file()]
            files = {path.name: File(path.read_bytes(), goes_through_lfs(path.name, b"")) for path in paths}
            hub.models[name] = Repository(name)
            hub.models[name].add_commit("main", Commit("model", files))
        real = Path(sys.executable).parent
        yield (
            page,
            {
                **os.environ,
                **hub.environment(),
                "PATH": os.pathsep.join(map(str, (stand_ins, real, os.environ["PATH"]))),
                "REAL": str(real),
                "PAGE": str(page),
                "HF_HOME": str(tmp_path / "hf"),
                "MTEB_CACHE": str(tmp_path / "mteb"),
                "no_proxy": "127.0.0.1",
            },
        )
    started = page / "started"
    for process in started.read_text().split() if started.exists() else []:
        os.kill(int(process), signal.SIGTERM)


def as_notebook(blocks):
    """Turn blocks into a notebook, whose cells of Python share their names as on a page."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    cells = []
    for block in blocks:
        code = block.code
        for old, new in REPLACED.items():
            code = code.replace(old, new.format(port=port))
        start = "%%bash\nset -e -o pipefail\n" if block.language == "bash" else ""
        cells.append(nbformat.v4.new_code_cell(f"{start}# {block.name}\n{code}"))
    return nbformat.v4.new_notebook(cells=cells)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if page_blocks(page)], ids=lambda page: page.stem)
def test_a_page_runs_from_top_to_bottom(page, world):
    folder, environment = world
    blocks = [block for block in page_blocks(page) if block.reason is None]
    if find_spec("mteb") is None:  # `make test-all` installs it
        blocks = [block for block in blocks if "pip install mteb" not in block.code]
    notebook = as_notebook(blocks)
    client = NotebookClient(notebook, timeout=500, kernel_name="python3", resources={"metadata": {"path": folder}})
    with contextlib.suppress(CellExecutionError):  # its message has every piece of the output under a title
        client.execute(env=environment)
    for cell in notebook.cells:
        if "error" in [output.output_type for output in cell.outputs]:
            texts = [output.get("text") or "\n".join(output["traceback"]) for output in cell.outputs]
            pytest.fail(f"{cell.source}\n{''.join(texts)}", pytrace=False)


def test_few_blocks_are_not_run():
    assert len([block for block in BLOCKS if block.reason is not None]) <= MAX_NOT_RUN


@pytest.mark.parametrize(
    "block", [block for block in BLOCKS if block.language == "python"], ids=lambda block: block.name
)
def test_python_compiles(block):
    compile(block.code, block.name, "exec")


@pytest.mark.parametrize(("name", "arguments"), COMMANDS, ids=lambda value: value if isinstance(value, str) else " ")
def test_a_command_has_the_options_that_it_is_given(name, arguments):
    group = typer.main.get_command(app)
    if arguments[0] == "--install-completion":
        return
    command = group.commands[arguments[0]]
    with command.make_context(arguments[0], arguments[1:]) as context:
        if arguments[0] in ("train", "teach") and context.params["recipe"] in preset_names("recipes"):
            changes = [*(context.params["overrides"] or []), *as_overrides(context.args)]
            read_recipe(context.params["recipe"], parse_changes(changes))


def test_extras_that_pages_install_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [names for block in BLOCKS for names in re.findall(r"(?:\.|clipmini)\[([\w,]+)\]", block.code)]
    assert named
    assert {name for names in named for name in names.split(",")} <= set(extras)


def texts_with_links():
    yield from ((page, page.read_text(encoding="utf-8")) for page in PAGES)
    for notebook in NOTEBOOKS:
        cells = nbformat.read(notebook, as_version=4).cells
        yield notebook, "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


@pytest.mark.parametrize(("page", "text"), texts_with_links(), ids=lambda value: getattr(value, "name", " "))
def test_linked_files_exist(page, text):
    assert [link for link in links_in(text) if not (page.parent / link).exists()] == []


def test_blocks_commands_and_links_are_found():
    """The readers of pages above, on a small page."""
    from pages import blocks_in

    text = 'A\n```bash\nclipmini search m f "a; b" --top 3 > x && clipmini serve m &  # c\n```\n'
    text += (
        "- B\n\n  <!-- not run: no reason -->\n  ```python\n  if 1:\n      pass\n  ```\n[a](b.md#c) [d](https://e.f)\n"
    )
    bash, python = blocks_in(text, "page")
    assert (bash.name, bash.reason, python.reason) == ("page:2", None, "no reason")
    assert python.code == "if 1:\n    pass\n"
    assert list(clipmini_commands(bash.code)) == [["search", "m", "f", "a; b", "--top", "3"], ["serve", "m"]]
    assert links_in(text) == ["b.md"]
