"""Pages and notebooks as their readers see them: code blocks, commands and links; import as `pages`."""

import itertools
import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")])
NOTEBOOKS = sorted((ROOT / "docs" / "tutorial").glob("*.ipynb"))
# A block, indented perhaps, and the comment above it that says why no test runs it.
BLOCK = re.compile(
    r"(?:<!-- not run: (?P<reason>.+?) -->\s*)?^(?P<indent> *)```(?P<language>bash|python)\n(?P<code>.*?)^ *```$",
    re.MULTILINE | re.DOTALL,
)


@dataclass(frozen=True)
class Block:
    """A fenced block of code.

    Attributes:
        name: the page and the line, for messages.
        language: "bash" or "python".
        code: without the page's indentation.
        reason: why it is not run; None if it is.
    """

    name: str
    language: str
    code: str
    reason: str | None


def blocks_in(text, name):
    """List the blocks of bash and Python in Markdown."""
    return [
        Block(
            f"{name}:{text.count(chr(10), 0, match.start('language')) + 1}",
            match["language"],
            re.sub(f"^{match['indent']}", "", match["code"], flags=re.MULTILINE),
            match["reason"],
        )
        for match in BLOCK.finditer(text)
    ]


def page_blocks(page):
    return blocks_in(page.read_text(encoding="utf-8"), page.relative_to(ROOT).as_posix())


def notebook_blocks(notebook):
    """List the blocks in the prose of a notebook, and the lines of its cells that go to the shell."""
    for number, cell in enumerate(nbformat.read(notebook, as_version=4).cells):
        name = f"{notebook.name}, cell {number}"
        if cell.cell_type == "markdown":
            yield from blocks_in(cell.source, name)
        else:
            yield from (Block(name, "bash", line, None) for line in re.findall(r"^!(.+)$", cell.source, re.MULTILINE))


def clipmini_commands(code):
    """Find the arguments of each call of `clipmini` in lines of bash, without those of other programs."""
    for line in code.replace("\\\n", " ").splitlines():
        reader = shlex.shlex(re.sub(r"\s\d?>+ ?[\w./]+(?=\s*([|;&]|$))", "", line), posix=True, punctuation_chars=True)
        reader.whitespace_split = True
        words = list(reader)
        for start, word in enumerate(words, start=1):
            if word == "clipmini":
                yield list(itertools.takewhile(lambda word: not set(word) <= set("&|;"), words[start:]))


def links_in(text):
    """List the files that Markdown links to or shows, without addresses and places on a page."""
    found = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return [link.partition("#")[0] for link in found if "://" not in link and not link.startswith("#")]
