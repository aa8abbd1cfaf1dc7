"""Read one table of any kind into columns: text with separators, JSON, Excel, parquet, Arrow, and captions in files.

Text is read here, because the readers of `datasets`, pandas and pyarrow stop at the first odd row, turn a missing
caption into "None", and let a quotation mark that is never closed swallow all rows after it. Here an error in a row
costs that row: it is counted as skipped, and reading goes on. What a table does not say of itself (its encoding,
separator, header) is detected, and stated in the notes of the result.

To teach it another kind of table, write a function like `_read_excel` and name its suffix in `READERS`.
"""

import ast
import contextlib
import csv
import io
import itertools
import json
import math
import numbers
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Value
from fsspec.compression import compr
from fsspec.utils import infer_compression

from clipmini.names import first_sentence

from .images import IMAGE_SUFFIXES, Skipped

DELIMITERS = ",\t|;"
TOKEN_LINE = re.compile(r"[^\t]+#\d+\t")  # image.jpg#0<TAB>caption
TEXT_FIELDS = ("raw", "caption", "text", "sentence")  # of a caption that is an object
NUMBER = re.compile(r"[-+]?\d*\.?\d+(e[-+]?\d+)?")
LITERAL = re.compile(r"""None|nan|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)  # a text as Python writes it
MAX_CAPTION_CHARACTERS = 100_000  # no text tower reads that far, and a tokenizer takes seconds to try
MAX_UNPACKED_BYTES = 2**30  # of a compressed table: a bomb would fill the memory
FEW_ACCENTED = 3  # letters, in a short text
MAX_ACCENTED = 0.2  # share of letters beyond ASCII; more in a text of one byte a letter is no Western language
NUM_SAMPLED = 100  # rows that a separator or a header is told from
BINARY_TYPES = (Value("binary"), Value("large_binary"))
SPLITS = {
    # restval: COCO validation images that Karpathy's split adds to training
    **dict.fromkeys(("train", "training", "trainval", "restval"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
# What begins so, or else ends so, is no table that is read here. None of it is opened: a pickle can run any code.
PICKLE = "a pickle, which can run any code when it is loaded"
REFUSED = {
    **{bytes([0x80, protocol]): PICKLE for protocol in range(2, 6)},
    b"\x89HDF": "an HDF5 file",
    b"\x93NUMPY": "a NumPy file",
    b"\xd0\xcf\x11\xe0": "an Excel file of the old kind (.xls)",
    b"SQLite format 3": "an SQLite database",
    b"7z\xbc\xaf": "a 7z archive",
    b"Rar!": "a RAR archive",
}
REFUSED_SUFFIXES = dict.fromkeys((".pkl", ".pickle"), PICKLE)


class NoPairsError(ValueError):
    """A file that can be read but is not a table of pairs."""


class NoRowsError(NoPairsError):
    """A table without rows."""


@dataclass
class Table:
    """A table before it is known which columns are images and captions.

    Attributes:
        path: its file; for captions in files beside the images, their folder.
        columns: by name, values row by row; of text tables only those that are wanted.
        names: of all columns.
        notes: what was detected, such as "cp1252".
    """

    path: Path
    columns: Dataset | Mapping[str, Any]
    names: list[str]
    notes: list[str] = field(default_factory=list)


def read_table(path: Path, skipped: Skipped, is_wanted: Callable[[str], bool]) -> Table:
    """Read a table of any kind.

    Args:
        path: the table.
        skipped: collects rows that cannot be parsed.
        is_wanted: whether a column of this name may be needed; others, which may be long, are not kept.

    Raises:
        NoPairsError: it is not a table.
        ValueError: it cannot be opened, or is of a kind that is not read here.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    suffix = suffixes[-2] if len(suffixes) > 1 and infer_compression(path.name) else "".join(suffixes[-1:])
    num_skipped = skipped.count
    try:
        with path.open("rb") as file:
            start = file.read(4096)
        refused = next(
            (kind for magic, kind in REFUSED.items() if start.startswith(magic)), REFUSED_SUFFIXES.get(suffix)
        )
        if refused:
            raise ValueError(f"{path} is {refused}; it is not read here. Save it as CSV, JSON Lines or parquet.")
        if start.startswith(b"PAR1"):
            return _read_parquet(path, is_wanted)
        if start.startswith(b"ARROW1") or suffix in (".arrow", ".feather"):
            return _read_arrow(path, is_wanted)
        if suffix == ".parquet":
            raise ValueError(f"{path} cannot be read as parquet: it does not begin like one.")
        if suffix in READERS:
            return READERS[suffix](path, skipped, is_wanted)
        return _read_text(path, skipped, is_wanted)
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or first_sentence(error)}.") from error
    except NoRowsError as error:
        if skipped.count == num_skipped:
            raise
        name, reason = skipped.items[num_skipped]
        raise NoRowsError(f"{path} has no row that can be read; the first, {name}, {reason}.") from error


def is_image_name(value: Any) -> bool:
    """Return whether a value ends like the name of an image's file."""
    return (
        isinstance(value, str) and len(value) < 4096 and os.path.splitext(value.strip())[1].lower() in IMAGE_SUFFIXES
    )


def caption_texts(value: Any) -> list[str | None]:
    """Convert a value of a caption column to a list of captions.

    Args:
        value: a text, a number, a list of these, a list written as text by JSON, Python or NumPy, or an object with
            its text in one of `TEXT_FIELDS`.

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
    if text[:1] in ("[", "{") and (parsed := _parse_list(text)) is not None:
        return caption_texts(parsed)
    return [text[:MAX_CAPTION_CHARACTERS] or None]


def _parse_list(text: str) -> Any:
    """Return the list or object that a text spells, or None: then it is a caption in brackets."""
    if text[:2] not in ("['", '["', "[{", '{"', "{'", "[]"):
        return None
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text)
    if text[1] != "{" and text[0] == "[":
        # pandas writes an array of NumPy without commas, which Python would read as one text.
        if not LITERAL.sub("", text).strip("[], \r\n\t"):
            with contextlib.suppress(ValueError, SyntaxError):
                return [None if item in ("None", "nan") else ast.literal_eval(item) for item in LITERAL.findall(text)]
        return None
    with contextlib.suppress(ValueError, SyntaxError, RecursionError, MemoryError):
        return ast.literal_eval(text)
    return None


def valid_unicode(text: str) -> str:
    """Replace unpaired surrogates, which JSON can spell and Arrow cannot store."""
    return text.encode("utf-8", "replace").decode("utf-8")


def read_caption_files(folder: Path, images: Sequence[Path], texts: Sequence[Path], skipped: Skipped) -> Table:
    """Read captions that lie in a text or JSON file for each image, beside it or in a folder that is laid out alike.

    Each line of a text file is a caption. Of a JSON file, all keys are columns; where there is a text file too, as in
    the output of img2dataset, that one holds the caption.

    Raises:
        NoPairsError: no image has such a file, or they hold mostly numbers, as the boxes of a detector do.
    """
    beside: dict[str, dict[Path, None]] = {}
    for text in texts:
        for stem in stems(text, folder):
            beside.setdefault(stem, {})[text] = None
    num_images = Counter(stem for image in images for stem in stems(image, folder))
    rows = []
    beside[""] = {}
    for image in images:
        unique = (stem for stem in stems(image, folder) if num_images[stem] == 1 and stem in beside)
        row = _read_captions_of(image, list(beside[next(unique, "")]), skipped)
        if row is not None:
            rows.append({**row, "file_name": image.relative_to(folder).as_posix()})
    if not any(len(row) > 1 for row in rows):
        raise NoPairsError(f"{folder} has no text or JSON files that belong to one image each, by their names.")
    words = [word for row in rows[:NUM_SAMPLED] for line in row.get("captions", ()) for word in str(line).split()]
    if sum(bool(NUMBER.fullmatch(word)) for word in words) > len(words) / 2:
        raise NoPairsError(
            f"The text files in {folder} hold mostly numbers, as the boxes of a detector, not captions."
        )
    return _table(folder, rows, lambda _: True, ["a file of captions for each image"])


def _read_captions_of(image: Path, files: Sequence[Path], skipped: Skipped) -> dict[str, Any] | None:
    """Read the captions of an image from its text file and its JSON file; None if one cannot be read."""
    texts = [file for file in files if file.suffix.lower() != ".json"]
    if len(texts) > 1:
        raise ValueError(f"{image} has captions in {texts[0]} and in {texts[1]}; move the files of one kind away.")
    row: dict[str, Any] = {}
    for file in sorted(files, key=texts.__contains__):
        try:
            content, _ = _decode(file)
            if file in texts:
                row["captions"] = [line for line in content.splitlines() if line.strip()]
            elif isinstance(document := json.loads(content), dict):
                row = document
        except ValueError as error:
            skipped.add(file, str(error).removeprefix(f"{file} "))
            return None
    return row


def stems(path: Path, folder: Path) -> tuple[str, ...]:
    """Return a path without suffix, relative to a folder that it is in; its last two parts; and its last.

    Of a.jpg.json, as some programs name what they know of a.jpg, both suffixes go.
    """
    stem, suffix = os.path.splitext(str(path)[len(str(folder)) :].lstrip(os.sep).replace(os.sep, "/"))
    if is_image_name(stem) and suffix.lower() not in IMAGE_SUFFIXES:
        stem = os.path.splitext(stem)[0]
    parts = stem.rsplit("/", 2)
    return tuple(dict.fromkeys((stem, "/".join(parts[-2:]), parts[-1])))


def _table(path: Path, rows: Iterable[Mapping[str, Any]], is_wanted: Callable[[str], bool], notes: list[str]) -> Table:
    """Turn rows to columns; a row need not have all of them."""
    columns: dict[str, list[Any]] = {}
    names: dict[str, None] = {}
    number = -1
    for number, row in enumerate(rows):
        for name, value in row.items():
            if name not in names:
                names[name] = None
                if is_wanted(name):
                    columns[name] = [None] * number
            if name in columns:
                columns[name].append(value)
        for values in columns.values():
            if len(values) == number:
                values.append(None)
    if number < 0:
        raise NoRowsError(f"{path} has no rows.")
    return Table(path, columns, list(names), notes)


def _read_bytes(path: Path) -> bytes:
    compression = infer_compression(path.name)
    with path.open("rb") as packed:
        if compression is None:
            return packed.read()
        try:
            data = compr[compression](packed).read(MAX_UNPACKED_BYTES + 1)
        except Exception as error:  # of a kind that depends on the compression
            raise ValueError(f"{path} cannot be unpacked: {first_sentence(error)}") from error
    if len(data) > MAX_UNPACKED_BYTES:
        raise ValueError(f"{path} has over {MAX_UNPACKED_BYTES / 2**30:g} GiB unpacked, the limit; split it.")
    return data


def _decode(path: Path) -> tuple[str, list[str]]:
    """Return the text of a file, and a note on its encoding if it is not UTF-8.

    Raises:
        ValueError: it is neither UTF-8 nor UTF-16, nor a Western text in cp1252, as Excel writes CSV.
    """
    data = _read_bytes(path)
    for mark, encoding in ((b"\xff\xfe\0\0", "utf-32"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            return data.decode(encoding, "replace"), [encoding.upper()]
    zeros = data[:NUM_SAMPLED].count(b"\0")
    if zeros > len(data[:NUM_SAMPLED]) / 3:  # without a mark, every other byte of a Western text
        encoding = "utf-16-be" if data[:1] == b"\0" else "utf-16-le"
        return data.decode(encoding, "replace"), [encoding.upper()]
    try:
        return data.decode("utf-8-sig"), []
    except UnicodeDecodeError:
        text = data.decode("utf-8", "replace")
    if (damaged := text.count("\ufffd")) < sum(not letter.isascii() for letter in text) / 2:
        return text, [f"UTF-8, of which {damaged:,} bytes are damaged and replaced"]
    with contextlib.suppress(UnicodeDecodeError):
        text = data.decode("cp1252")
        letters = [letter for letter in text[:100_000] if letter.isalpha()]
        num_accented = sum(not letter.isascii() for letter in letters)
        if b"\0" not in data and num_accented <= max(MAX_ACCENTED * len(letters), FEW_ACCENTED):
            return text, ["cp1252"]
    what = (
        "a binary file of a kind that is not read here" if b"\0" in data else "text, but not UTF-8, UTF-16 or cp1252"
    )
    raise ValueError(f"{path} is {what}; save it as UTF-8.")


def _read_text(path: Path, skipped: Skipped, is_wanted: Callable[[str], bool]) -> Table:
    """Read a Flickr token file, or rows with separators, of which every value is a string."""
    text, notes = _decode(path)
    lines = io.StringIO(text, newline="").readlines()
    del text
    if lines and TOKEN_LINE.match(lines[0]):
        return _table(path, _parse_tokens(path, lines, skipped), is_wanted, notes)
    start = 0
    if lines and (match := re.fullmatch(r"sep=(.)\s*", lines[0])):  # written for Excel
        delimiter, start = match[1], 1
    else:
        delimiter = _find_delimiter(lines[:NUM_SAMPLED])
    if delimiter != "," and path.suffix.lower() != ".tsv":
        notes.append(f"separated by {'tabs' if delimiter == chr(9) else delimiter}")

    def rows() -> Iterator[tuple[str, Sequence[Any]]]:
        for number, row in _parse(lines[start:], delimiter):
            name = f"{path} line {number + start}"
            if isinstance(row, csv.Error):
                skipped.add(name, f"cannot be parsed ({row})")
            else:
                yield name, row

    return _from_fields(path, rows(), skipped, is_wanted, notes)


def _from_fields(
    path: Path,
    rows: Iterator[tuple[str, Sequence[Any]]],
    skipped: Skipped,
    is_wanted: Callable[[str], bool],
    notes: list[str],
) -> Table:
    """Make a table of rows whose first is the header, if it is one; it is none if it names an image."""
    first = next(((name, row) for name, row in rows if any(row)), None)
    if first is None:
        raise NoRowsError(f"{path} has no rows.")
    sample: list[tuple[str, Sequence[Any]]] = []
    if any(map(_is_image, first[1])):
        sample = [first, *itertools.islice(rows, NUM_SAMPLED)]
        header = _name_columns(path, [row for _, row in sample])
        notes.append(f"no header line: its columns are taken as {', '.join(header)}")
    else:
        header = _distinct(["" if cell is None else str(cell).strip() for cell in first[1]])
    num_columns = len(header)

    def items() -> Iterator[dict[str, Any]]:
        for name, row in itertools.chain(sample, rows):
            if not any(row):  # as Excel keeps rows that were formatted
                continue
            if len(row) == num_columns:
                yield dict(zip(header, row, strict=True))
            else:
                skipped.add(name, f"has {len(row)} fields instead of {num_columns}")

    table = _table(path, items(), is_wanted, notes)
    table.names = [name for name in table.names if name]
    return table


def _distinct(names: Sequence[str]) -> list[str]:
    """Number equal names: three columns `caption` are `caption`, `caption_2` and `caption_3`."""
    seen: Counter[str] = Counter()
    result = []
    for name in names:
        seen[name] += 1
        result.append(name if not name or seen[name] == 1 else f"{name}_{seen[name]}")
    return result


def _name_columns(path: Path, rows: Sequence[Sequence[Any]]) -> list[str]:
    """Name the columns of a table without a header by what they hold: images, and one that holds sentences.

    Raises:
        NoPairsError: there is not one of each.
    """
    width = max(map(len, rows))
    kinds = []
    for column in range(width):
        values = [row[column] for row in rows if len(row) > column and row[column] not in (None, "")]
        is_image = sum(map(_is_image, values)) > len(values) / 2
        is_text = sum(len(str(value).split()) > 1 for value in values) > len(values) / 2
        kinds.append("image" if is_image else "caption" if is_text else f"column {column + 1}")
    if kinds.count("image") != 1 or kinds.count("caption") != 1:
        raise NoPairsError(
            f"{path} has no header line, and its {width} columns do not show which one holds captions; add a first "
            "line that names the columns, such as image,caption."
        )
    return kinds


def _is_image(value: Any) -> bool:
    return is_image_name(value) or is_base64(value) or str(value).startswith(("http://", "https://"))


def is_base64(value: Any) -> bool:
    """Return whether a value is an image as base64 text, by its first bytes: JPEG, PNG, RIFF (WebP) or GIF."""
    return (
        isinstance(value, str)
        and len(value) > 64
        and value.lstrip().startswith(("data:image/", "/9j/", "iVBORw0KGgo", "UklGR", "R0lGOD"))
    )


def _parse_tokens(path: Path, lines: Sequence[str], skipped: Skipped) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if TOKEN_LINE.match(line):
            name, _, caption = line.partition("\t")
            yield {"image": name.rpartition("#")[0], "caption": caption}
        elif line.strip():
            skipped.add(f"{path} line {number}", "is not image#number<TAB>caption")


def _find_delimiter(lines: Sequence[str]) -> str:
    """Return what separates most of the lines into as many fields as the first, and that into the most."""

    def score(delimiter: str) -> tuple[int, int]:
        counts = []
        for line in lines:
            with contextlib.suppress(csv.Error):
                counts += [len(row) for row in csv.reader([line], delimiter=delimiter)]
        return (counts.count(counts[0]), counts[0]) if counts and counts[0] > 1 else (0, 0)

    return max(DELIMITERS, key=score)


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


def _read_excel(path: Path, skipped: Skipped, is_wanted: Callable[[str], bool]) -> Table:
    """Read the first sheet that has rows."""
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(
            f'{path} is an Excel sheet; install what reads it with pip install "clipmini[excel]", or save it as CSV.'
        ) from error
    try:
        book = openpyxl.load_workbook(path, read_only=True, data_only=True)
        sheets = [sheet for sheet in book.worksheets if any(any(row) for row in sheet.iter_rows(values_only=True))]
    except Exception as error:  # of many kinds, from zipfile to an XML parser
        raise ValueError(f"{path} cannot be read as an Excel sheet: {first_sentence(error)}") from error
    if not sheets:
        raise NoPairsError(f"{path} has no rows.")
    notes = [f"sheet {sheets[0].title}"]
    if len(sheets) > 1:
        notes.append(f"not read: {', '.join(sheet.title for sheet in sheets[1:])}")
    rows = ((f"{path} row {n}", row) for n, row in enumerate(sheets[0].iter_rows(values_only=True), 1))
    return _from_fields(path, rows, skipped, is_wanted, notes)


def _read_json(path: Path, skipped: Skipped, is_wanted: Callable[[str], bool]) -> Table:
    text, notes = _decode(path)
    try:
        document = json.loads(text)
    except ValueError:  # lines of JSON with this suffix are common
        return _read_json_lines(path, skipped, is_wanted)
    except RecursionError as error:
        raise ValueError(f"{path} cannot be read as JSON: it is nested too deeply.") from error
    del text
    rows, note = _json_rows(path, document, is_wanted)
    return _from_objects(
        path, ((f"{path} item {n}", row) for n, row in enumerate(rows, 1)), skipped, is_wanted, notes + note
    )


def _read_json_lines(path: Path, skipped: Skipped, is_wanted: Callable[[str], bool]) -> Table:
    text, notes = _decode(path)

    def items() -> Iterator[tuple[str, Any]]:
        for number, line in enumerate(io.StringIO(text), 1):
            if line.strip():
                try:
                    yield f"{path} line {number}", json.loads(line)
                except (ValueError, RecursionError) as error:
                    skipped.add(f"{path} line {number}", f"is not JSON ({getattr(error, 'msg', 'nested too deeply')})")

    return _from_objects(path, items(), skipped, is_wanted, notes)


def _from_objects(
    path: Path, items: Iterator[tuple[str, Any]], skipped: Skipped, is_wanted: Callable[[str], bool], notes: list[str]
) -> Table:
    first = next(items, None)
    items = itertools.chain([] if first is None else [first], items)
    if first is not None and isinstance(first[1], list):
        fields = ((name, row if isinstance(row, list) else [row]) for name, row in items)
        return _from_fields(path, fields, skipped, is_wanted, notes)

    def rows() -> Iterator[Mapping[str, Any]]:
        for name, row in items:
            if isinstance(row, dict):
                yield row
            else:
                skipped.add(name, "is not an object with columns")

    return _table(path, rows(), is_wanted, notes)


def _json_rows(path: Path, document: Any, is_wanted: Callable[[str], bool]) -> tuple[Iterable[Any], list[str]]:
    """Find the rows of a JSON document, which may be written in any of a dozen ways.

    Returns:
        Rows, objects or lists of fields; and notes on what the document is.

    Raises:
        NoPairsError: it holds none.
    """
    if isinstance(document, list) and (not document or any(isinstance(item, (dict, list)) for item in document)):
        return document, []
    if not isinstance(document, dict):
        raise NoPairsError(f"{path} holds neither a list of objects nor lines of them.")
    if isinstance(document.get("annotations"), list) and isinstance(document.get("images"), list):
        return _join_coco(path, document), ["as COCO has it"]
    if isinstance(document.get("columns"), list) and isinstance(document.get("data"), list):  # pandas, orient="split"
        return [document["columns"], *document["data"]], []
    values = list(document.values())
    if values and all(map(is_image_name, document)):
        rows = (
            row if isinstance(row, dict) and not any(name in row for name in TEXT_FIELDS) else {"captions": row}
            for row in values
        )
        return ({**row, "image": name} for name, row in zip(document, rows, strict=True)), ["its keys are images"]
    lists = {
        key: rows for key, rows in document.items() if isinstance(rows, list) and rows and isinstance(rows[0], dict)
    }
    if len(lists) > 1 and all(key.lower() in SPLITS for key in lists):
        return (row | {"split": key} for key, rows in lists.items() for row in rows if isinstance(row, dict)), []
    for key, objects in lists.items():  # as in Karpathy's `{"images": ...}`
        others = [other for other in lists if other != key]
        return objects, [f"its list {key!r}, and not {', '.join(others)}"] if others else []
    return _rows_of_columns(document, values, is_wanted), []


def _rows_of_columns(
    document: Mapping[str, Any], values: Sequence[Any], is_wanted: Callable[[str], bool]
) -> Iterable[Any]:
    """Return the rows of an object that has a list or an object for each column, or an object for each row."""
    if len(values) > 1 and all(isinstance(value, list) and len(value) == len(values[0]) for value in values):
        return (dict(zip(document, row, strict=True)) for row in zip(*values, strict=True))
    if not values or not all(isinstance(value, dict) for value in values):
        return [document]
    if not any(map(is_wanted, document)):  # pandas, orient="index"
        return values
    names = dict.fromkeys(itertools.chain.from_iterable(values))  # pandas' default
    return ({column: cells.get(name) for column, cells in document.items()} for name in names)


def _join_coco(path: Path, document: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    captions: dict[Any, list[Any]] = {}
    for annotation in document["annotations"]:
        if isinstance(annotation, dict) and "caption" in annotation:
            captions.setdefault(str(annotation.get("image_id")), []).append(annotation["caption"])
    if not captions:
        raise NoPairsError(f"{path} has annotations of images, but no captions.")
    for image in filter(lambda image: isinstance(image, dict), document["images"]):
        address = image.get("file_name") or image.get("coco_url") or image.get("url") or ""
        yield {"file_name": address, "captions": captions.pop(str(image.get("id")), [])}
    for number, texts in captions.items():  # captions of an image that the file does not list
        yield {"file_name": number, "captions": texts}


def _read_parquet(path: Path, is_wanted: Callable[[str], bool]) -> Table:
    try:
        schema = pq.read_schema(path)
        if _holds_images(schema):
            dataset = Dataset.from_parquet(str(path))  # `load_dataset` would also report the download to a server
            return Table(path, dataset, dataset.column_names)
        table = pq.read_table(path, columns=[name for name in schema.names if is_wanted(name)], memory_map=True)
    except Exception as error:
        raise ValueError(f"{path} cannot be read as parquet: {first_sentence(error)}") from error
    return Table(path, {name: table[name] for name in table.column_names}, schema.names)


def _read_arrow(path: Path, is_wanted: Callable[[str], bool]) -> Table:
    try:
        source = pa.memory_map(str(path))
        try:
            table = pa.ipc.open_file(source).read_all()
        except pa.ArrowInvalid:
            table = pa.ipc.open_stream(pa.memory_map(str(path))).read_all()
    except Exception as error:
        raise ValueError(f"{path} cannot be read as Arrow: {first_sentence(error)}") from error
    if _holds_images(table.schema):
        return Table(path, Dataset(datasets.table.InMemoryTable(table)), table.column_names)
    return Table(path, {name: table[name] for name in table.column_names if is_wanted(name)}, table.column_names)


def _holds_images(schema: pa.Schema) -> bool:
    """Return whether a column has bytes, or the types of `datasets` are stated: then it is read as a data set."""

    def has_bytes(kind: pa.DataType) -> bool:
        is_struct = pa.types.is_struct(kind)
        return (
            pa.types.is_binary(kind)
            or pa.types.is_large_binary(kind)
            or (is_struct and any(field.name == "bytes" for field in kind.fields))
        )

    return any(has_bytes(field.type) for field in schema) or b"huggingface" in (schema.metadata or {})


READERS: dict[str, Callable[[Path, Skipped, Callable[[str], bool]], Table]] = {
    ".xlsx": _read_excel,
    ".xlsm": _read_excel,
    ".json": _read_json,
    ".jsonl": _read_json_lines,
    ".jsonlines": _read_json_lines,
    ".ndjson": _read_json_lines,
}
