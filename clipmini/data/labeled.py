"""Load images with class labels, for zero-shot classification and probes.

Folders are not read by the `imagefolder` builder of `datasets` (5.2). Without a word it drops all other classes where
one is called "train" or "test", all labels where images are at different depths or there is one class only, and AVIF
and HEIC images. It also writes a copy of the list of files to the cache, and reports every load to a server.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

from clipmini.names import locate

from .images import IMAGE_SUFFIXES, Skipped, walk_files
from .scan import scan_images
from .sources import SPLITS, find_column, find_image_column, load_from_hub

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")


@dataclass(frozen=True)
class LabeledImages:
    """Images, each with one of C labels.

    Attributes:
        names: the C class names, with spaces for the underscores of folder names.
        splits: some of "train", "validation" and "test": data sets with the columns `image`, as `read_image` takes it,
            and `label`, from 0 to C - 1, or -1 for an image without one.
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
    """Load images with labels, without opening them. Splits without any label, as some test splits are, are left out.

    Args:
        source: a folder with a sub-folder for each class, or with "train", "validation" and "test" above these; or the
            Hub id of a data set with a column of images and one of class labels.
        image_column: the column of images, of a data set on the Hub; None to find it by type.
        label_column: its column of labels; None to find it by type and usual names.
        config_name: its configuration, where it has several.

    Raises:
        ValueError: the source, its columns or its classes cannot be found, two classes have one name, or an option has
            no meaning for a folder.
    """
    located = locate(source, "a folder", "dataset")
    path = Path(located)
    if path.is_dir():
        options = {"image_column": image_column, "label_column": label_column, "config_name": config_name}
        for key, value in options.items():
            if value is not None:
                raise ValueError(f"{key}={value!r} has no meaning for the folder {source}; leave it out.")
        loaded: Mapping[Any, Dataset] = _read_folder(path)
    elif path.exists():
        raise ValueError(f"{source} is a file; name a folder with a sub-folder for each class.")
    else:
        loaded = load_from_hub(located, config_name)
    features = next(iter(loaded.values())).features
    image_column = find_image_column(features, image_column, source)
    label_column = label_column or _label_column_by_type(features)
    label_column = find_column(features, label_column, LABEL_COLUMNS, "label", source)
    names = _class_names(loaded, label_column)
    splits: dict[str, Dataset] = {}
    for split, rows in loaded.items():
        labels = _label_indices(rows[label_column][:], names)
        if labels.max(initial=-1) >= 0:
            rows = rows.select_columns([image_column]).rename_columns({image_column: "image"})
            rows = rows.cast_column("image", Image(decode=False))
            rows = rows.add_column("label", labels, new_fingerprint=os.urandom(8).hex(), feature=Value("int64"))
            splits[SPLITS.get(str(split).lower(), str(split))] = rows
    if not splits:
        raise ValueError(f"{source} has no image with a label.")
    return LabeledImages(_replace_underscores(names, source), splits)


def keep_readable(rows: Dataset, split: str, skipped: Skipped) -> Dataset:
    """Keep the images that can be read and have a label, of a split that `load_labeled` returned.

    Args:
        rows: the split.
        split: its name, for messages.
        skipped: collects the images that are left out.

    Raises:
        ValueError: no image is left.
    """
    facts = scan_images(rows)
    kept = []
    for row, (path, fault, label) in enumerate(zip(facts.paths, facts.faults, rows["label"], strict=True)):
        if fault is not None or label < 0:
            skipped.add(path or f"{split} row {row + 1}", fault or "has no label")
        else:
            kept.append(row)
    if not kept:
        raise ValueError(f"The split {split} has no image that can be read and has a label.")
    return rows.select(kept)


def _replace_underscores(names: Sequence[str], source: str | Path) -> list[str]:
    """Write class names with spaces, and raise if that makes two of them equal."""
    originals: dict[str, str] = {}
    for name in names:
        other = originals.setdefault(name.replace("_", " "), name)
        if other != name:
            raise ValueError(f"{source} has two classes of one name, {other!r} and {name!r}; rename or join them.")
    return list(originals)


def _read_folder(folder: Path) -> dict[str, Dataset]:
    """Read sub-folders as classes; or as splits, where all of them are named like splits and have sub-folders."""
    subfolders = _subfolders(folder)
    not_splits = [path.name for path in subfolders if path.name.lower() not in SPLITS or not _subfolders(path)]
    roots = {"train": folder}
    if not not_splits:
        roots = {SPLITS[path.name.lower()]: path for path in subfolders}
        if len(roots) < len(subfolders):
            names = ", ".join(path.name for path in subfolders)
            raise ValueError(f"{folder} has several folders for one split: {names}; keep or join them as one.")
    elif len(not_splits) < len(subfolders):
        raise ValueError(
            f"{folder} has sub-folders that hold classes like splits, and others that do not "
            f"({', '.join(not_splits)}); move these out, or name the folder of one split."
        )
    images = {
        split: [(str(path), of.name) for of in _subfolders(root) for path in sorted(walk_files(of, IMAGE_SUFFIXES))]
        for split, root in roots.items()
    }
    class_names = sorted({name for rows in images.values() for _, name in rows})
    if not class_names:
        raise ValueError(f"{folder} has no sub-folder with images; make one for each class, and put its images in.")
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=class_names)})
    return {
        split: Dataset.from_dict(
            {"image": [{"bytes": None, "path": path} for path, _ in rows], "label": [name for _, name in rows]},
            features=features,
        )
        for split, rows in images.items()
    }


def _subfolders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _label_column_by_type(features: Mapping[str, Any]) -> str | None:
    names = [name for name, feature in features.items() if isinstance(feature, ClassLabel)]
    return names[0] if len(names) == 1 else next((name for name in LABEL_COLUMNS if name in names), None)


def _class_names(loaded: Mapping[Any, Dataset], column: str) -> list[str]:
    feature = next(iter(loaded.values())).features[column]
    if isinstance(feature, ClassLabel):
        return list(feature.names)
    values = {value for rows in loaded.values() for value in rows.unique(column) if value is not None}
    if getattr(feature, "dtype", "") != "string" or not values:
        raise ValueError(
            f"The column {column!r} holds no class names; say which one does with --set label_column=NAME."
        )
    return sorted(values)


def _label_indices(labels: Sequence[Any], names: Sequence[str]) -> np.ndarray:
    """Return each label's index in `names`; -1 for an image without a label, as in unlabeled test splits."""
    index_of = {name: index for index, name in enumerate(names)}
    indices = [-1 if label is None else label if isinstance(label, int) else index_of[label] for label in labels]
    return np.array(indices, dtype=np.int64)
