"""Choose the columns of a table that hold images and captions, by name and type, and convert their values.

Values come as Python lists (from text), as Arrow arrays, or in a data set. They stay Arrow wherever they can: a Python
object for each of a million rows takes seconds and much of the memory.
"""

import base64
import binascii
import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, Image
from datasets.table import InMemoryTable

from .images import join_names, shorten
from .tables import BINARY_TYPES, MAX_CAPTION_CHARACTERS, NoPairsError, caption_texts, valid_unicode

# Usual names, likeliest first.
IMAGE_COLUMNS = (
    *("image", "images", "img", "picture", "photo", "image_path", "img_path", "image_file", "image_filename"),
    *("image_file_name", "image_name", "file_name", "filename", "filepath", "file_path", "path", "file"),
    *("jpg", "jpeg", "png", "webp", "image_id", "img_id", "imgid"),
)
CAPTION_COLUMNS = (
    *("captions", "caption", "image_caption", "sentences", "sentence", "texts", "text", "descriptions", "description"),
    *("comments", "comment", "alt_text", "alt", "title", "raw", "txt", "caption_str", "reference_strs"),
)


NO_IMAGE = re.compile("mask|depth|segment|thumb")  # in the name of a column of images that captions do not describe


def _plain_name(column: str) -> str:
    """Return the name of a column as the usual names are written: `Image Path` and `imagePath` are image_path."""
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())).lower()


def find_named(columns: Iterable[str], usual: Sequence[str]) -> str | None:
    """Return the first column that has a usual name, however it is written."""
    by_name = {_plain_name(column): column for column in columns}
    by_name |= {_plain_name(column).replace("_", ""): column for column in columns} | by_name
    return next((by_name[name] for name in usual if name in by_name), None)


def find_captions(columns: Iterable[str]) -> list[str]:
    """Find the columns of the likeliest usual name, with or without numbers: `caption_0` to `caption_4`."""
    by_stem: dict[str, list[str]] = {}
    for column in columns:
        by_stem.setdefault(re.sub(r"_?\d+$", "", _plain_name(column)), []).append(column)
    return next((by_stem[name] for name in CAPTION_COLUMNS if name in by_stem), [])


def find_column(
    columns: Collection[str],
    wanted: str | None,
    usual: Sequence[str],
    kind: str,
    source: str | Path,
    shown: Collection[str] | None = None,
) -> str:
    """Find a column by its exact name, if one is wanted, or else by usual names, likeliest first.

    Raises:
        NoPairsError: there is no such column; the message lists those that there are, or `shown` instead.
    """
    found = wanted or find_named(columns, usual)
    if found is None or found not in columns:
        missing = f"column {wanted!r}" if wanted else f"{kind} column by any usual name"
        names = join_names(shorten(repr(name)) for name in shown or columns)
        addresses = [name for name in shown or columns if kind == "image" and "url" in _plain_name(name)]
        if addresses and not wanted:
            raise NoPairsError(
                f"{source} has no column of images but addresses in {join_names(addresses)}, which are not fetched; "
                "download them first, with img2dataset for example."
            )
        # A header that is none shows as names of columns that are values.
        remedy = "" if wanted else " (if these are no names, its header line is missing: add one)"
        raise NoPairsError(f"{source} has no {missing}; set {kind}_column to one of its columns: {names}{remedy}.")
    return found


def is_image_type(feature: Any) -> bool:
    """Return whether a feature of `datasets` is that of images."""
    return isinstance(feature, Image) or (isinstance(feature, dict) and "bytes" in feature)


def find_image_column(
    features: Mapping[str, Any], wanted: str | None, source: str | Path, shown: Collection[str] | None = None
) -> str:
    """Find the column of images: the one that is wanted; or the only one of their type, or of bytes; or by its name.

    Raises:
        NoPairsError: as in `find_column`.
    """
    images = [
        name for name, feature in features.items() if is_image_type(feature) and not NO_IMAGE.search(name.lower())
    ]
    binaries = [name for name, feature in features.items() if feature in BINARY_TYPES]
    if wanted is None and len(images) == 1:
        wanted = images[0]
    elif wanted is None and images:
        wanted = find_named(images, IMAGE_COLUMNS)
    elif wanted is None and len(binaries) == 1 and find_named(features, IMAGE_COLUMNS) is None:
        wanted = binaries[0]
    return find_column(features, wanted, IMAGE_COLUMNS, "image", source, shown)


def values_of(columns: Any, name: str) -> Any:
    """Return a column as it is; of a data set as Arrow, without decoding anything."""
    if isinstance(columns, Dataset):
        return columns.select_columns([name]).with_format("arrow")[:][name]
    return columns[name]


def as_array(values: Any) -> pa.Array | None:
    """Return values as one Arrow array, or None if they are of several types or no valid text."""
    try:
        array = pa.array(values) if isinstance(values, list) else values
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        return None
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    return array.cast(pa.string()) if pa.types.is_large_string(array.type) else array


def names_in(values: Any) -> pa.Array | None:
    """Convert a column to names of images: stripped texts, null where there is none. None if it holds no names."""
    array = as_array(values)
    if array is not None and pa.types.is_floating(array.type):  # ids of which some are missing, as pandas writes them
        numbers = array.cast(pa.int64(), safe=False)
        array = numbers if pc.all(pc.or_kleene(pc.equal(numbers, array), pc.is_nan(array))).as_py() else array
    if array is not None and pa.types.is_integer(array.type):
        array = array.cast(pa.string())
    if array is None or pa.types.is_nested(array.type) or pa.types.is_null(array.type):
        array = pa.array(map(_path_in, values if array is None else array.to_pylist()), pa.string())
    if not pa.types.is_string(array.type):
        return None
    array = pc.utf8_trim_whitespace(array)
    return pc.if_else(pc.equal(array, ""), None, array)


def _path_in(value: Any) -> str | None:
    """Convert a value of an image column to a path; None if there is none."""
    if isinstance(value, Mapping):
        value = value.get("path")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    return None if value is None else valid_unicode(str(value))


def captions_in(values: Any) -> pa.ListArray:
    """Convert a column to a list of captions for each row, as `caption_texts` does."""
    array = as_array(values)
    if array is None:
        return pa.array(map(caption_texts, values), pa.list_(pa.string()))
    is_list = pa.types.is_list(array.type)
    texts = array.flatten() if is_list else array
    if pa.types.is_string(texts.type) and not pc.any(pc.match_substring_regex(texts, r"^\s*[\[{]")).as_py():
        texts = pc.utf8_slice_codeunits(pc.utf8_trim_whitespace(texts), 0, MAX_CAPTION_CHARACTERS)
        counts = pc.fill_null(pc.list_value_length(array), 0).to_numpy() if is_list else np.ones(len(array), np.int32)
        return _as_lists(pc.if_else(pc.equal(texts, ""), None, texts), counts)
    return pa.array(map(caption_texts, array.to_pylist()), pa.list_(pa.string()))


def join_captions(columns: Sequence[pa.ListArray], num_rows: int) -> pa.ListArray:
    """Join the captions of several columns row by row; blank cells among them are no captions that are missing."""
    if not columns:
        return pa.nulls(num_rows, pa.list_(pa.string()))
    if len(columns) == 1:
        return columns[0]
    texts = pa.concat_arrays([column.flatten() for column in columns])
    rows = np.concatenate([pc.list_parent_indices(column).to_numpy() for column in columns])
    is_text = texts.is_valid().to_numpy(zero_copy_only=False)
    order = np.argsort(rows[is_text], kind="stable")
    return _as_lists(texts.filter(pa.array(is_text)).take(order), np.bincount(rows[is_text], minlength=num_rows))


def _as_lists(texts: pa.Array, counts: np.ndarray) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), texts)


def as_images(data: pa.Array, paths: pa.Array | None) -> Dataset:
    """Return the column `image` of bytes, or of paths, which `read_image` takes row by row."""
    structs = pa.StructArray.from_arrays(
        [data, pa.nulls(len(data), pa.string()) if paths is None else paths], ["bytes", "path"]
    )
    # Without a fingerprint, `datasets` would hash all paths.
    info = datasets.DatasetInfo(features=Features({"image": Image(decode=False)}))
    return Dataset(InMemoryTable.from_pydict({"image": structs}), info=info, fingerprint=os.urandom(8).hex())


def decode_base64(text: str | None) -> bytes | None:
    """Return the bytes that a text spells; none of an image if it spells none."""
    if text is None:
        return None
    try:
        return base64.b64decode(
            text.partition("base64,")[2] or text, altchars=b"-_" if "-" in text or "_" in text else None
        )
    except (binascii.Error, ValueError):
        return b""  # which the check of all images finds to be no image
