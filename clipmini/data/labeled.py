"""Images with class labels, for zero-shot classification and probes."""

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from datasets.exceptions import DatasetsError

from clipmini.data.images import first_sentence
from modeling_clipmini.images_clipmini import find_fault

from .images import Skipped, find_images
from .sources import SPLITS

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
IMAGE_COLUMNS = ("image", "img")


@dataclass(frozen=True)
class LabeledImages:
    """Images, each with one of C labels.

    Attributes:
        names: the C labels' names; blanks stand for the underscores of folder names.
        splits: "train", "validation" and "test", or some of them: data sets with the columns `image`, as `read_image`
            takes it, and `label`, from 0 to C - 1.
    """

    names: list[str]
    splits: dict[str, Dataset]


def load_labeled(
    source: str | Path,
    *,
    image_column: str | None = None,
    label_column: str | None = None,
    config_name: str | None = None,
) -> LabeledImages:
    """Find images with labels; none is opened yet. Splits without any label, as some test splits are, are left out.

    Args:
        source: a folder with a sub-folder for each class, or with "train", "validation" and "test" above these; or the
            Hub id of a data set with a column of images and one of class labels.
        image_column: the column of images, of a data set from the Hub; None to find it by type.
        label_column: its column of labels; None to find it by type and usual names.
        config_name: its configuration, where it has several.

    Returns:
        The images; see `keep_readable`.

    Raises:
        ValueError: the source, its columns or its classes cannot be found, two classes have one name, or an option has
            no meaning for a folder.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        given = {"image_column": image_column, "label_column": label_column, "config_name": config_name}
        for key, value in given.items():
            if value is not None:
                raise ValueError(f"{key}={value!r} has no meaning for the folder {source}; leave it out.")
        names, loaded = _read_folder(path)
    elif path.exists():
        raise ValueError(f"{source} is a file; name a folder with a sub-folder for each class.")
    elif str(source).count("/") > 1 or str(source).startswith((".", "/")):
        raise ValueError(f"{source} does not exist; name a folder, or a Hub id like org/name.")
    else:
        names, loaded = _read_hub(str(source), image_column, label_column, config_name)
    splits = {split: rows for split, rows in loaded.items() if max(rows["label"], default=-1) >= 0}
    if not splits:
        raise ValueError(f"{source} has no image with a label.")
    return LabeledImages(_spell(names, source), splits)


def keep_readable(rows: Dataset, split: str, skipped: Skipped) -> Dataset:
    """Keep the images of a split that can be read and have a label; every one is opened.

    Args:
        rows: as `load_labeled` gives.
        split: what they are called in messages.
        skipped: takes the others.

    Returns:
        The rest.

    Raises:
        ValueError: nothing is left.
    """
    kept = _find_readable(rows, split, skipped)
    if not kept:
        raise ValueError(f"The split {split} has no image that can be read and has a label.")
    return rows.select(kept)


def _spell(names: Sequence[str], source: str | Path) -> list[str]:
    """Write the names of classes with blanks."""
    spelled: dict[str, str] = {}
    for name in names:
        other = spelled.setdefault(name.replace("_", " "), name)
        if other != name:
            raise ValueError(f"{source} has two classes of one name, {other!r} and {name!r}; rename or join them.")
    return list(spelled)


def _read_folder(folder: Path) -> tuple[list[str], dict[str, Dataset]]:
    """Take sub-folders for classes; or, where all of them are called like splits and hold folders, for splits."""
    below = _folders(folder)
    are_splits = [path.name.lower() in SPLITS and bool(_folders(path)) for path in below]
    if any(are_splits) and not all(are_splits):
        odd = ", ".join(path.name for path, fits in zip(below, are_splits, strict=True) if not fits)
        raise ValueError(
            f"{folder} has sub-folders that hold classes like splits, and others that do not ({odd}); take these out, "
            "or name the folder of one split."
        )
    is_split = bool(below) and all(are_splits)
    roots = {SPLITS[path.name.lower()]: path for path in below} if is_split else {"train": folder}
    if is_split and len(roots) < len(below):
        raise ValueError(f"{folder} has several folders for one split: {', '.join(path.name for path in below)}.")
    found = {split: list(_find_labeled(root)) for split, root in roots.items()}
    names = sorted({name for images in found.values() for name, _ in images})
    if not names:
        raise ValueError(f"{folder} has no sub-folder with images; make one for each class, and put its images in.")
    features = Features({"image": datasets.Image(decode=False), "label": Value("int64")})
    return names, {
        split: Dataset.from_dict(
            {
                "image": [{"bytes": None, "path": str(path)} for _, path in images],
                "label": [names.index(name) for name, _ in images],
            },
            features=features,
        )
        for split, images in found.items()
    }


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _find_labeled(root: Path) -> Iterator[tuple[str, Path]]:
    for folder in _folders(root):
        try:
            yield from ((folder.name, path) for path in find_images(folder))
        except ValueError:  # no image in it: no class
            continue


def _read_hub(
    source: str, image_column: str | None, label_column: str | None, config_name: str | None
) -> tuple[list[str], dict[str, Dataset]]:
    try:
        loaded = datasets.load_dataset(source, config_name)
    except (OSError, RuntimeError, ValueError, DatasetsError) as error:
        raise ValueError(f"{source} cannot be loaded as images with labels: {first_sentence(error)}.") from error
    features = next(iter(loaded.values())).features
    image_column = image_column or _find(features, IMAGE_COLUMNS, datasets.Image, "image_column", source)
    label_column = label_column or _find(features, LABEL_COLUMNS, ClassLabel, "label_column", source)
    for column in (image_column, label_column):
        if column not in features:
            raise ValueError(f"{source} has no column {column!r}; it has {', '.join(features)}.")
    names = _names(features[label_column], loaded, label_column)
    splits: dict[str, Dataset] = {}
    for name, rows in loaded.items():
        split = SPLITS.get(str(name).lower(), str(name))
        labels = _numbers(rows[label_column][:], names)
        rows = rows.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
        if image_column != "image":
            rows = rows.rename_column(image_column, "image")
        rows = rows.add_column("label", labels, new_fingerprint=os.urandom(8).hex(), feature=Value("int64"))
        splits[split] = rows
    return names, splits


def _find(features: Mapping[str, Any], usual: Sequence[str], kind: type, key: str, source: str) -> str:
    """Find a column by its type, and among several of that type, or none, by its name."""
    fit = [name for name, feature in features.items() if isinstance(feature, kind)]
    named = [name for name in usual if name in (fit or features)]
    if len(fit) == 1 or named:
        return named[0] if named else fit[0]
    raise ValueError(f"{source} has several columns, {', '.join(features)}; say which with --set {key}=NAME.")


def _names(feature: Any, loaded: DatasetDict, column: str) -> list[str]:
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = {value for rows in loaded.values() for value in rows.unique(column) if value is not None}
    if getattr(feature, "dtype", "") != "string" or not values:
        raise ValueError(
            f"The column {column!r} holds no names of classes; say which does with --set label_column=NAME."
        )
    return sorted(values)


def _numbers(labels: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Give each label's number; -1 for an image without one, as in unlabeled test splits."""
    number_of = {name: number for number, name in enumerate(names)}
    numbers = [-1 if label is None else label if isinstance(label, int) else number_of[label] for label in labels]
    return np.array(numbers, dtype=np.int64)


def _find_readable(rows: Dataset, split: str, skipped: Skipped) -> list[int]:
    """Find the images that can be read and have a label, and report the others."""
    if not len(rows):
        return []
    checked = rows.select_columns(["image"]).map(
        _check_row,
        remove_columns=["image"],
        features=Features({"fault": Value("string"), "path": Value("string")}),
        keep_in_memory=True,
        load_from_cache_file=False,
        new_fingerprint=os.urandom(8).hex(),
        desc=f"checking images of {split}",
    )
    kept = []
    for row, (fault, path, label) in enumerate(zip(checked["fault"], checked["path"], rows["label"], strict=True)):
        if fault is None and label >= 0:
            kept.append(row)
        else:
            skipped.add(path or f"{split} row {row + 1}", fault or "has no label")
    return kept


def _check_row(row: dict[str, Any]) -> dict[str, str | None]:
    return {"fault": find_fault(row["image"]), "path": row["image"] and row["image"]["path"]}
