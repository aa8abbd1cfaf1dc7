"""Load images with class labels, for zero-shot classification and probes.

Folders are not read by the `imagefolder` builder of `datasets` (5.2). Without a word it drops all other classes where
one is called "train" or "test", all labels where images are at different depths or there is one class only, and AVIF
and HEIC images. It also writes a copy of the list of files to the cache, and reports every load to a server.
"""

import csv
import json
import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image, Value

from clipmini.names import expand, locate

from .columns import find_column, find_image_column
from .images import IMAGE_SUFFIXES, LEFT_OUT, Skipped, join_names, shorten, walk_files
from .scan import scan_images
from .sources import SPLITS, load_from_hub

logger = logging.getLogger(__name__)

LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
# Folders as people name splits: seg_train, training_set, test1.
SPLIT_FOLDER = re.compile(rf"(?:.+[-_. ])?({'|'.join(SPLITS)})(?:[-_. ]?(?:set|data|images|\d+))?")
NUMBER = re.compile(r"^(?:n\d{8}|\d+)[-_. ]+(?=.*[^\W\d_])")  # 001.Black_footed_Albatross, n02085620-Chihuahua
CODE = re.compile(r"n\d{8}|(?:(?:class|label|category|id|c)[-_ ]?)?\d+", re.IGNORECASE)
HOW_TO_NAME = "write a line CODE,NAME for each class in a .csv file."


@dataclass(frozen=True)
class LabeledImages:
    """Images, each with one of C labels.

    Attributes:
        names: the C class names: as `class_names` gives them, or those of folders, with spaces for underscores and
            without the number that all of them begin with.
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
    class_names: str | Path | Mapping[str, str] | None = None,
) -> LabeledImages:
    """Load images with labels, without opening them. Splits without any label, as some test splits are, are left out.

    Args:
        source: a folder with a sub-folder for each class, or with folders named like splits ("train", "val",
            "seg_test") above these; or the Hub id of a data set with a column of images and one of class labels.
        image_column: the column of images, of a data set on the Hub; None to find it by type.
        label_column: its column of labels; None to find it by type and usual names.
        config_name: its configuration, where it has several.
        class_names: what to call the classes, by the names that they have in the source; or a file that says so:
            `{"n01440764": "tench"}` or ImageNet's class index in JSON, `n01440764,tench` in CSV, or other text with
            lines such as `n01440764 tench, Tinca tinca`. Several of one name get their own in brackets.

    Raises:
        ValueError: the source, its columns or its classes cannot be found, two classes have one name, `class_names`
            lacks one, or an option has no meaning for a folder.
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
    return LabeledImages(_name_classes(names, source, class_names), splits)


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


def _name_classes(
    names: Sequence[str], source: str | Path, class_names: str | Path | Mapping[str, str] | None
) -> list[str]:
    """Return the class names in words, each another, and say what was changed."""
    words = list(names)
    if class_names is not None:
        given: Mapping[Any, str] = class_names if isinstance(class_names, Mapping) else _read_class_names(class_names)
        given = {str(name): str(word or "") for name, word in given.items()}  # YAML makes a number of 0
        if missing := [name for name in names if not given.get(name, "").strip()]:
            raise ValueError(
                f"class_names gives no name to {len(missing)} of {len(names)} classes in {source}: {_some(missing)}; "
                f"it names {_some(given)}."
            )
        words = [given[name] for name in names]
    elif all(map(NUMBER.match, names)) and len({NUMBER.sub("", name) for name in names}) == len(names):
        words = [NUMBER.sub("", name) for name in names]
    words = [" ".join(word.replace("_", " ").split()) for word in words]
    counts = Counter(words)
    if shared := [name for name, word in zip(names, words, strict=True) if counts[word] > 1]:
        if class_names is None:
            raise ValueError(
                f"{source} has several classes of one name, {_some(shared)}; rename or join them, or give each a name "
                "with class_names."
            )
        logger.warning("told apart %d classes of one name by their own in brackets: %s", len(shared), _some(shared))
        words = [f"{word} ({name})" if counts[word] > 1 else word for name, word in zip(names, words, strict=True)]
    changed = [f"{name} is {word}" for name, word in zip(names, words, strict=True) if word != name.replace("_", " ")]
    if changed:
        logger.warning("%d of %d classes have another name: %s", len(changed), len(names), _some(changed))
    if codes := [word for word in words if CODE.fullmatch(word)]:
        logger.warning(
            "%d of %d class names are codes, which say nothing to a model: %s; set class_names to a file: %s",
            *(len(codes), len(words), _some(codes), HOW_TO_NAME),
        )
    return words


def _read_class_names(path: str | Path) -> dict[str, str]:
    """Read the names of classes by their folders, from any file that `load_labeled` takes."""
    try:
        file = Path(expand(path))
        text = file.read_text(encoding="utf-8-sig")
        rows: list[Any]
        if file.suffix.lower() == ".json":  # {"n01440764": "tench"}, or Keras's {"0": ["n01440764", "tench"]}
            rows = [value if isinstance(value, list) else [key, value] for key, value in json.loads(text).items()]
        elif file.suffix.lower() == ".csv":
            delimiter = ";" if ";" in text.partition("\n")[0] else ","
            rows = [row for row in csv.reader(text.splitlines(), delimiter=delimiter, strict=True) if row]
        else:
            rows = [line.split("\t" if "\t" in line else None, 1) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError, AttributeError, csv.Error) as error:  # AttributeError: no JSON object
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"class_names={path} cannot be read ({reason}); {HOW_TO_NAME}") from error
    for row in rows:
        if len(row) != 2 or not all(isinstance(field, str) for field in row):
            raise ValueError(f"class_names={path} has {str(row)[:80]}, which is no class and its name; {HOW_TO_NAME}")
    return {name.strip(): word for name, word in rows}


def _read_folder(folder: Path) -> dict[str, Dataset]:
    """Read sub-folders as classes, or as splits that hold these, and say what is left out."""
    roots = _split_folders(folder)
    images = [
        (split, of, path)
        for split, root in roots.items()
        for of in _subfolders(root)
        for path in sorted(walk_files(of, IMAGE_SUFFIXES))
    ]
    if not images:
        raise ValueError(f"{folder} has no sub-folder with images; make one for each class, and put its images in.")
    if not any(path.parent == of for _, of, path in images):
        _, of, path = images[0]
        raise ValueError(
            f"{of} would be a class, but has no image, and nor has any beside it: they are in folders below, as in "
            f"{path.relative_to(of).parts[0]}. If these are the classes, name the folder that holds them; if they are "
            "splits, put them above the classes."
        )
    used = {*roots.values(), *(root.parent for root in roots.values()), *(of for _, of, _ in images)}
    others = [path for root in {folder, *roots.values()} for path in root.iterdir() if path not in used]
    others = [path for path in others if path.is_dir() or path.suffix.lower() in IMAGE_SUFFIXES]
    if left_out := sorted(str(path.relative_to(folder)) for path in others if not path.name.startswith(".")):
        logger.warning("left out %d images and folders that belong to no class: %s", len(left_out), _some(left_out))
    class_names = sorted({of.name for _, of, _ in images})
    features = Features({"image": Image(decode=False), "label": ClassLabel(names=class_names)})
    return {
        split: Dataset.from_dict(
            {
                "image": [{"bytes": None, "path": str(path)} for named, _, path in images if named == split],
                "label": [of.name for named, of, _ in images if named == split],
            },
            features=features,
        )
        for split in roots
    }


def _split_folders(folder: Path) -> dict[str, Path]:
    """Find the folders that hold those of classes, by split: the folder itself, as "train", if it has no splits."""
    subfolders = [path for path in _subfolders(folder) if _has_images(path)]
    named = {path: SPLITS[match[1]] for path in subfolders if (match := SPLIT_FOLDER.fullmatch(path.name.lower()))}
    # An archive is often unpacked into a folder of its own name.
    roots = {path: path / path.name if _subfolders(path) == [path / path.name] else path for path in named}
    holding = [path for path in named if any(map(_has_images, _subfolders(roots[path])))]
    if not holding and len(set(named.values())) < 2 and len(named) < len(subfolders):
        if named:
            folders = _some(path.name for path in named)
            logger.warning("took %s for classes, although they are named like splits", folders)
        return {"train": folder}
    if others := _some(path.name for path in subfolders if path not in holding):
        raise ValueError(
            f"{folder} has splits, which are no classes: each must hold a folder for each class, with its images. Not "
            f"so {others}; make these folders, move them out, or name the folder of one split."
        )
    if len(set(named.values())) < len(named):
        names = ", ".join(path.name for path in named)
        raise ValueError(f"{folder} has several folders for one split: {names}; keep or join them as one.")
    return {split: roots[path] for path, split in named.items()} or {"train": folder}


def _subfolders(folder: Path) -> list[Path]:
    """List the folders in a folder, without hidden ones and those that systems and viewers make."""
    paths = (path for path in folder.iterdir() if not path.name.startswith("."))
    return sorted(path for path in paths if path.name.lower() not in LEFT_OUT and path.is_dir())


def _some(items: Iterable[str]) -> str:
    """Join the first of some names, shortened."""
    return join_names(map(shorten, items))


def _has_images(folder: Path) -> bool:
    return next(walk_files(folder, IMAGE_SUFFIXES), None) is not None


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
