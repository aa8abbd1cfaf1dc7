"""Text tables of pairs, row by row: CSV and its kin, JSON, and the Flickr token files.

What one row gets wrong costs that row, never the table: the rest is read on, and the row is counted as skipped.
"""

import csv
import json
import math
import numbers
import re
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .images import Skipped

JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = ",\t|;"
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")  # image.jpg#0<TAB>caption
KAGGLE_HEADER = re.compile(r"image(_name)?\s*[,|]\s*(caption|comment)")
TEXT_FIELDS = ("raw", "caption", "text", "sentence")  # of a caption that is an object
MAX_CAPTION_CHARACTERS = 100_000  # no text tower reads as far; a tokenizer that has to try takes seconds


class NoPairsError(ValueError):
    """A file can be read, but is no table of pairs."""


def is_token_file(path: Path) -> bool:
    """Tell a Flickr token file, or Kaggle's form of one, from other text by its first line."""
    return bool(TOKEN_LINE.match(_first_line(path)) or KAGGLE_HEADER.match(_first_line(path)))


def read_rows(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    """Read a text table of whatever kind.

    A token file gives the columns `image` and `caption`. CSV is what does not begin like one; its delimiter is the
    commonest of comma, tab, bar and semicolon in the header, and every value is a string.

    Args:
        path: the table.
        skipped: takes rows that cannot be parsed.

    Yields:
        Column name to value.

    Raises:
        ValueError: the file is not UTF-8, or no table at all.
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
    """Read a caption column's value as a list of captions, whatever it is.

    Args:
        value: a text, a number, a list of them, a list written as JSON, or an object with its text in one of
            `TEXT_FIELDS`.

    Returns:
        The captions, stripped and cut to `MAX_CAPTION_CHARACTERS`; None for each that is empty or no text.
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
        try:
            return caption_texts(json.loads(text))
        except ValueError:
            pass  # a caption in brackets
    return [text[:MAX_CAPTION_CHARACTERS] or None]


def valid_unicode(text: str) -> str:
    """Replace halves of surrogate pairs, which JSON can spell and Arrow cannot store."""
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
    first_line = _first_line(path)
    delimiter = max(DELIMITERS, key=first_line.count)
    header: list[str] = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        for number, row in _parse(file, delimiter):
            place = f"{path} line {number}"
            if isinstance(row, csv.Error):
                skipped.add(place, f"cannot be parsed ({row})")
            elif not header:
                header = [name.strip() for name in row]
            elif len(row) == len(header):
                yield dict(zip(header, row, strict=True))
            elif row:
                skipped.add(place, f"has {len(row)} fields instead of {len(header)}")


def _parse(lines: Iterator[str], delimiter: str) -> Iterator[tuple[int, list[str] | csv.Error]]:
    """Parse rows, each with the number of its first line; a fault takes up that line alone.

    Strict, for a quotation mark that is never closed would otherwise swallow the rows that follow. Flickr30k's
    results.csv is the one kind with bars, and quotes nothing. With tabs, a line whose quotes do not parse has none.
    """
    quoting: Any = csv.QUOTE_NONE if delimiter == "|" else csv.QUOTE_MINIMAL
    unread: deque[str] = deque()

    def take(taken: list[str]) -> Iterator[str]:
        while line := unread.popleft() if unread else next(lines, ""):
            taken.append(line)
            yield line

    number = 1
    while True:
        taken: list[str] = []
        row: list[str] | csv.Error | None
        try:
            row = next(csv.reader(take(taken), delimiter=delimiter, quoting=quoting, strict=True), None)
        except csv.Error as error:
            row = taken[0].rstrip("\r\n").split("\t") if delimiter == "\t" else error
            unread.extendleft(reversed(taken[1:]))
            del taken[1:]
        if row is None:
            return
        yield number, row
        number += len(taken)


def _read_json(path: Path, skipped: Skipped) -> Iterator[dict[str, Any]]:
    rows: Any = None
    if path.suffix.lower() == ".json":
        try:
            rows = json.loads(path.read_text(encoding="utf-8-sig"))
        except json.JSONDecodeError:
            pass  # lines of JSON under this suffix are common
    for place, row in _json_lines(path, skipped) if rows is None else _json_items(path, rows):
        if isinstance(row, dict):
            yield row
        else:
            skipped.add(place, "is not an object with columns")


def _json_lines(path: Path, skipped: Skipped) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            place = f"{path} line {number}"
            if line.strip():
                try:
                    yield place, json.loads(line)
                except json.JSONDecodeError as error:
                    skipped.add(place, f"is not JSON ({error.msg})")


def _json_items(path: Path, rows: Any) -> Iterator[tuple[str, Any]]:
    """Go through a list of objects, or the one that an object holds, as Karpathy's `{"images": [...]}` does."""
    if isinstance(rows, dict):
        lists = [value for value in rows.values() if isinstance(value, list) and value and isinstance(value[0], dict)]
        rows = lists[0] if lists else [rows]
    if not isinstance(rows, list):
        raise NoPairsError(f"{path} holds neither a list of objects nor lines of them.")
    return ((f"{path} item {number}", row) for number, row in enumerate(rows, 1))
