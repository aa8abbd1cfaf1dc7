"""Read text tables of pairs row by row: CSV and its relatives, JSON, and the Flickr token files.

An error in a row costs that row, never the table: it is counted as skipped, and reading goes on. The readers of
`datasets`, pandas and pyarrow stop instead, and a quotation mark that is never closed swallows all rows after it.
"""

import contextlib
import csv
import json
import math
import numbers
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .images import Skipped

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = ",\t|;"
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")  # image.jpg#0<TAB>caption
KAGGLE_HEADER = re.compile(r"image(_name)?\s*[,|]\s*(caption|comment)")
TEXT_FIELDS = ("raw", "caption", "text", "sentence")  # of a caption that is an object
MAX_CAPTION_CHARACTERS = 100_000  # no text tower reads that far, and a tokenizer takes seconds to try


class NoPairsError(ValueError):
    """A file that can be read but is not a table of pairs."""


def is_token_file(path: Path) -> bool:
    """Return whether the first line is that of a Flickr token file, or of Kaggle's version of one."""
    first_line = _first_line(path)
    return bool(TOKEN_LINE.match(first_line) or KAGGLE_HEADER.match(first_line))


def read_rows(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Read a text table of any kind.

    A token file yields the columns `image` and `caption`. Other text is CSV; its delimiter is the most frequent of
    comma, tab, bar and semicolon in the header, and every value is a string.

    Args:
        path: the table.
        skipped: collects rows that cannot be parsed.

    Yields:
        Each row, as a mapping from column name to value.

    Raises:
        ValueError: the file cannot be opened, is not UTF-8, or is not a table.
    """
    try:
        if path.suffix.lower() in JSON_SUFFIXES:
            yield from _read_json(path, skipped)
        elif TOKEN_LINE.match(_first_line(path)):
            yield from _read_tokens(path, skipped)
        else:
            yield from _read_delimited(path, skipped)
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text, as a table must be; save it as UTF-8.") from error
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from error


def caption_texts(value: Any) -> list[str | None]:
    """Convert a value of a caption column to a list of captions.

    Args:
        value: a text, a number, a list of these, a list written as JSON, or an object with its text in one of
            `TEXT_FIELDS`.

    Returns:
        The captions, stripped and cut to `MAX_CAPTION_CHARACTERS`; None for each that is empty or not a text.
    """
    if isinstance(value, (list, tuple)):
        return [text for item in value for text in caption_texts(item)]
    if isinstance(value, Mapping):
        return caption_texts(next((value[name] for name in TEXT_FIELDS if name in value), None))
    if isinstance(value, numbers.Number) and not isinstance(value, (bool, complex)):
        return [None if math.isnan(value) else str(value)]  # type: ignore[arg-type]
    if not isinstance(value, str):
        return [None]
    text = valid_unicode(value.strip())
    if text.startswith('["') and text.endswith('"]'):
        with contextlib.suppress(ValueError):  # otherwise it is a caption in brackets
            return caption_texts(json.loads(text))
    return [text[:MAX_CAPTION_CHARACTERS] or None]


def valid_unicode(text: str) -> str:
    """Replace unpaired surrogates, which JSON can spell and Arrow cannot store."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _first_line(path: Path) -> str:
    with path.open(encoding="utf-8-sig", errors="replace") as file:
        return file.readline(10_000)


def _read_tokens(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if TOKEN_LINE.match(line):
                name, _, caption = line.partition("\t")
                yield {"image": name.rpartition("#")[0], "caption": caption}
            elif line.strip():
                skipped.add(f"{path} line {number}", "is not image#number<TAB>caption")


def _read_delimited(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = file.readlines()
    delimiter = max(DELIMITERS, key="".join(lines[:1]).count)
    header: list[str] = []
    for number, row in _parse(lines, delimiter):
        if isinstance(row, csv.Error):
            skipped.add(f"{path} line {number}", f"cannot be parsed ({row})")
        elif not header:
            header = [name.strip() for name in row]
        elif len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        elif row:
            skipped.add(f"{path} line {number}", f"has {len(row)} fields instead of {len(header)}")


def _parse(lines: list[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Parse rows, each with the number of its first line; an error takes up one line only.

    Parsing is strict, because a quotation mark that is never closed would otherwise swallow the rows that follow.
    Flickr30k's results.csv is the only kind of table with bars, and quotes nothing. In a table with tabs, a line whose
    quotes do not parse is taken to have none.
    """
    quoting: Any = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    start = 0
    while start < len(lines):
        remaining = (lines[index] for index in range(start, len(lines)))  # a slice would copy them after each error
        reader = csv.reader(remaining, delimiter=delimiter, quoting=quoting, strict=True)
        row_start = start
        try:
            for row in reader:
                yield row_start + 1, row
                row_start = start + reader.line_num
            return
        except csv.Error as error:
            unquoted = lines[row_start].rstrip("\r\n").split("\t")
            yield row_start + 1, unquoted if delimiter == "\t" else error
            start = row_start + 1


def _read_json(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    document: Any = None
    if path.suffix.lower() == ".json":
        with contextlib.suppress(json.JSONDecodeError):  # lines of JSON with this suffix are common
            document = json.loads(path.read_text(encoding="utf-8-sig"))
    for name, row in _json_lines(path, skipped) if document is None else _json_items(path, document):
        if isinstance(row, dict):
            yield row
        else:
            skipped.add(name, "is not an object with columns")


def _json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            name = f"{path} line {number}"
            if line.strip():
                try:
                    yield name, json.loads(line)
                except json.JSONDecodeError as error:
                    skipped.add(name, f"is not JSON ({error.msg})")


def _json_items(path: Path, document: Any) -> Iterator[tuple[str, Any]]:
    """Number the items of a list, or of the first list of objects in an object, as in Karpathy's `{"images": ...}`."""
    rows = document
    if isinstance(document, dict):
        lists = (
            value for value in document.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        )
        rows = next(lists, [document])
    if not isinstance(rows, list):
        raise NoPairsError(f"{path} holds neither a list of objects nor lines of them.")
    return ((f"{path} item {number}", row) for number, row in enumerate(rows, 1))
