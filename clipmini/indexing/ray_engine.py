"""Embed images on all machines of a Ray cluster, into the same index and by the same functions as on one.

The driver lists what there is, and Ray Data hands it out in blocks to actors, each of which has loaded the model once.
An actor leaves out what is in the table, reads and embeds the rest, and writes it. A block whose actor died is handed
out again. The table's primary key is what leaves each image once: of two writes of one image, the second is refused
and tried again on the table as it then is.
"""

import hashlib
import json
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import ray
from datasets import Features
from ray.data import ActorPoolStrategy, DataContext, Dataset
from ray.exceptions import RayError

from clipmini.data.images import IMAGE_SUFFIXES, Skipped
from clipmini.data.sources import CAPTION_COLUMNS, NoPairsError, find_column, find_image_column
from clipmini.data.tables import caption_texts
from clipmini.names import expand, first_sentence

from .index import Index
from .listing import Entry
from .update import NUM_PER_WRITE, Changes, embed_and_write, prepare_all, update_index

ROW_SUFFIXES = (".parquet", ".tar")  # files that hold images in rows: Ray reads them, and no list is made before
FILES = pa.schema([(item.name, pa.int64() if item.type is int else pa.string()) for item in fields(Entry)])
RESULT = pa.schema({"embedded": pa.string(), "known": pa.string(), "skipped": pa.string(), "reason": pa.string()})


class Embedder:
    """An actor: embeds blocks of images with a model that it loads once, and writes them to the index.

    Args:
        path: the index, which all machines see under this name.
        model: likewise, a model's folder or its id on the Hub.
        engine: what computes it.
        make_entries: makes images of the rows of a block.
    """

    def __init__(self, path: str, model: str, engine: str, make_entries: Callable[[pa.Table], list[Entry]]) -> None:
        self._index = Index(path, model, engine)
        self._make_entries = make_entries
        _ = self._index.encoder  # which loads the model

    def __call__(self, block: pa.Table) -> pa.Table:
        """Embed a block, and return a row for each image: its digest, or its name and why it was skipped."""
        index = self._index
        index.table.checkout_latest()
        entries = {entry.key: entry for entry in self._make_entries(block)}
        rows = index.select(entries, "key", ["key", "size", "mtime_ns", "caption", "digest"]).to_pylist()
        known = {
            row["key"]: row["digest"]
            for row in rows
            if entries[row["key"]].state == (row["size"], row["mtime_ns"], row["caption"])
        }
        skipped = Skipped()
        new = [entry for key, entry in entries.items() if key not in known]
        embedded, _ = embed_and_write(index, prepare_all(index.encoder, new, (), skipped), index)
        results: list[dict[str, str]] = [{"embedded": digest} for digest in embedded]
        results += [{"known": digest} for digest in known.values()]
        results += [{"skipped": name, "reason": reason} for name, reason in skipped.items]
        return pa.Table.from_pylist(results, schema=RESULT)


def update_index_with_ray(index: Index, sources: Sequence[str | Path], skipped: Skipped) -> Changes:
    """Bring an index up to date as `update_index` does, on the cluster of RAY_ADDRESS, or on this machine alone.

    Images that lie in files are compared by size and time, and dropped from the index when they are gone. Those in
    rows of parquet files and webdataset's tar files, and those in object storage, are only added.

    Args:
        index: the index, at a path or an address that all machines see.
        sources: as in `list_images`; or names or addresses of parquet or tar files, of which * stands for several, as
            in s3://bucket/shards/*.tar; or the address of a folder of images, such as s3://bucket/photos.
        skipped: collects images that cannot be read.

    Raises:
        ValueError: as `update_index` does; a source has images in rows that Ray does not read; or a worker failed.
    """
    names = [expand(str(source)) for source in sources]
    streamed = [name for name in names if "://" in name or name.endswith(ROW_SUFFIXES)]
    is_started_here = not ray.is_initialized()
    if is_started_here:
        ray.init(log_to_driver=False)
    context = DataContext.get_current()
    context.enable_progress_bars = False
    try:
        listed = [name for name in names if name not in streamed]
        changes = update_index(index, listed, skipped, embed=_embed_files)
        num_embedded = num_known = 0
        with index.locked():
            for name in streamed:
                for result in _run(index, *_read(index, name)):
                    num_embedded += result["embedded"] is not None
                    num_known += result["known"] is not None
                    _add_skipped(result, skipped)
            if num_embedded:
                index.table.checkout_latest()
                index.optimize()
    finally:
        if is_started_here:
            ray.shutdown()
    return replace(
        changes,
        num_embedded=changes.num_embedded + num_embedded,
        num_unchanged=changes.num_unchanged + num_known,
        num_images=len(index),
    )


def _embed_files(
    index: Index,
    entries: Sequence[Entry],
    digests: Collection[str],
    skipped: Skipped,
    on_progress: Callable[[int], Any],
) -> tuple[list[str], list[str]]:
    """Embed images that lie in files; as `embed_here` does, but what was renamed is embedded again."""
    inner = next((entry for entry in entries if not entry.has_file), None)
    if inner is not None:
        raise ValueError(
            f"{inner.source} holds its images in rows: Ray reads these from parquet and tar files only. "
            "Name such files, or index it without it."
        )
    blocks = [
        pa.Table.from_pylist([vars(entry) for entry in entries[start : start + NUM_PER_WRITE]], schema=FILES)
        for start in range(0, len(entries), NUM_PER_WRITE)
    ]
    embedded = []
    for result in _run(index, ray.data.from_arrow(blocks), _entries_of_files):
        # What is known already was embedded in this run, by an actor that died before it could say so.
        done = result["embedded"] or result["known"]
        embedded += [done] if done else []
        _add_skipped(result, skipped)
        on_progress(1)
    index.table.checkout_latest()
    return embedded, []


def _add_skipped(result: dict[str, Any], skipped: Skipped) -> None:
    if result["skipped"] is not None:
        skipped.add(result["skipped"], result["reason"])


def _run(index: Index, rows: Dataset, make_entries: Callable[[pa.Table], list[Entry]]) -> Iterator[dict[str, Any]]:
    """Yield the results of actors, of which there is one for each GPU of the cluster or, without any, for each CPU."""
    resources = ray.cluster_resources()
    num_gpus = int(resources.get("GPU", 0))
    results = rows.map_batches(
        Embedder,
        fn_constructor_args=(index.path, index.model_name, index.engine, make_entries),
        compute=ActorPoolStrategy(min_size=1, max_size=max(1, num_gpus or int(resources["CPU"]))),
        batch_size=NUM_PER_WRITE,
        batch_format="pyarrow",
        zero_copy_batch=True,
        num_cpus=0 if num_gpus else 1,
        num_gpus=1 if num_gpus else 0,
    )
    try:
        yield from results.iter_rows()
    except RayError as error:
        raise ValueError(
            f"A worker failed: {first_sentence(error.cause if hasattr(error, 'cause') else error)} What was embedded "
            "before is in the index; run the same command again to go on."
        ) from error


def _read(index: Index, name: str) -> tuple[Dataset, Callable[[pa.Table], list[Entry]]]:
    """Return the rows of a source, and what makes images of them.

    Raises:
        ValueError: the source cannot be read, or has no images.
    """
    name = name if "://" in name else os.path.abspath(name)
    try:
        filesystem, folder = fsspec.url_to_fs(name)
        if name.endswith(ROW_SUFFIXES):
            files = [filesystem.unstrip_protocol(path) for path in sorted(filesystem.glob(folder))]
            if not files:
                raise ValueError(f"{name} cannot be read: there is no such file.")
            if name.endswith(".tar"):
                rows = ray.data.read_webdataset(files, filesystem=filesystem, decoder=None)
                return rows, partial(_entries_of_webdataset, name)
            rows = ray.data.read_parquet(files, filesystem=filesystem)
            image, caption = _find_columns(rows, name)
            columns = [image, caption] if caption else [image]
            return rows.select_columns(columns), partial(_entries_of_parquet, name, image, caption)
        found = [path for path in filesystem.find(folder) if os.path.splitext(path)[1].lower() in IMAGE_SUFFIXES]
        if not found:
            raise ValueError(f"{name} has no images; looked for {', '.join(sorted(IMAGE_SUFFIXES))}.")
        known = {row["key"] for row in index.select([name], "source", ["key"]).to_pylist()}
        new = [path for path in map(filesystem.unstrip_protocol, found) if path not in known]
        if not new:
            return ray.data.from_items([]), partial(_entries_of_addresses, name)
        rows = ray.data.read_binary_files(new, include_paths=True, filesystem=filesystem)
        return rows, partial(_entries_of_addresses, name)
    except (OSError, ImportError, RayError) as error:
        raise ValueError(f"{name} cannot be read: {first_sentence(error)}") from error


def _find_columns(rows: Dataset, name: str) -> tuple[str, str | None]:
    """Return the columns of images and of captions, if there are any."""
    features = Features.from_arrow_schema(rows.schema().base_schema)
    image = find_image_column(features, None, name)
    try:
        return image, find_column([column for column in features if column != image], None, CAPTION_COLUMNS, "", name)
    except NoPairsError:
        return image, None


def _entries_of_files(block: pa.Table) -> list[Entry]:
    return [Entry(**row) for row in block.to_pylist()]


def _entries_of_addresses(source: str, block: pa.Table) -> list[Entry]:
    return [_make_entry(source, row["bytes"], None, row["path"]) for row in block.to_pylist()]


def _entries_of_parquet(source: str, image: str, caption: str | None, block: pa.Table) -> list[Entry]:
    entries = []
    for row in block.to_pylist():
        content = row[image]["bytes"] if isinstance(row[image], dict) else row[image]
        entries.append(_make_entry(source, content, row.get(caption)))
    return entries


def _entries_of_webdataset(source: str, block: pa.Table) -> list[Entry]:
    """Each row has the files of one name, by suffix; captions are in name.txt, or in name.json."""
    entries = []
    for row in block.to_pylist():
        content = next((row[name] for name in row if f".{name}".lower() in IMAGE_SUFFIXES and row[name]), None)
        caption = row.get("txt") or json.loads(row.get("json") or b"{}").get("caption")
        entries.append(_make_entry(source, content, caption.decode() if isinstance(caption, bytes) else caption))
    return entries


def _make_entry(source: str, content: bytes | None, caption: Any, key: str | None = None) -> Entry:
    """Return an image without a file, with the key that `list_images` gives it."""
    key = key or f"{source}#{hashlib.blake2b(content or b'', digest_size=16).hexdigest()}"
    texts = "\n".join(text for text in caption_texts(caption) if text) or None
    return Entry(key, source, ([{"image": {"bytes": content}}], 0), caption=texts)
