"""An index of images: their vectors and what else is known of them, in a Lance table that is kept and searched.

An index is a folder with `manifest.json`, which names the model that made it, and the table `images.lance`. Every
write to the table is a transaction: a run that is killed leaves it as it was after its last batch.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import fsspec
import lancedb
import numpy as np
import pyarrow as pa
import torch
from datasets import Dataset
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from clipmini.data.images import Skipped
from clipmini.files import atomic_write, cache_root, remove_leftovers, weights_sha256
from clipmini.inference.embed import DualEncoder, hash_weights
from clipmini.inference.encoders import load_encoder
from clipmini.inference.prompts import check_queries
from clipmini.inference.search import COSINE, NORMALIZED, Hits, embed_queries, rank
from clipmini.names import MANIFEST_FILE, check_utf8, expand, first_sentence, is_index
from modeling_clipmini.modeling_clipmini import normalize

from .vectors import Tuning, nearest, stack, update_vector_index

if TYPE_CHECKING:
    from .update import Changes

TABLE = "images"
SCHEMA_VERSION = 1
LOCK_FILE = "lock-writer"  # `store.clear` keeps what is locked by such a file
OWN_NAMES = {LOCK_FILE, f"{TABLE}.lance"}  # what a run leaves that is killed before there is a manifest
MULTIPLE = 8  # of the dimensions of stored vectors: compressed indexes take no other number
NUM_AT_ONCE = 1000  # keys in one condition
SEVERAL = 5  # times as many images are found where near-copies are left out
SHOWN = "key, caption, width, height, date, latitude, longitude, size and source"


@dataclass(frozen=True)
class Manifest:
    """What an index was made with.

    Attributes:
        model: the model's absolute path, its id on the Hub, or open_clip's name.
        model_sha256: digest of the model: its weights, its bank, and how it prepares images and captions.
        weights_sha256: digest of the weight file alone, known before the model is loaded; None unless it is a folder.
        num_dimensions: of the model's embeddings.
        has_priors: whether the model's bank gave each image a prior; see `Bank`.
        schema_version: of the table's columns.
        tuning: how the vector index is asked; None while all vectors are compared, since they are few.
    """

    model: str
    model_sha256: str
    weights_sha256: str | None
    num_dimensions: int
    has_priors: bool
    schema_version: int = SCHEMA_VERSION
    tuning: Tuning | None = None

    @property
    def schema(self) -> pa.Schema:
        """The columns of the table.

        `vector` holds the image's embedding v and its negative prior: [v, -prior, 0, ...], so that its product with
        [t, 1, 0, ...] is the normalized score of a caption t, and with [t, 0, 0, ...] the cosine.
        """
        width = -(-(self.num_dimensions + 1) // MULTIPLE) * MULTIPLE
        columns = {
            "source": pa.string(),
            "size": pa.int64(),
            "mtime_ns": pa.int64(),
            "digest": pa.string(),
            "width": pa.int32(),
            "height": pa.int32(),
            "date": pa.string(),  # as text, since conditions compare no time with '2024-01-01'
            "latitude": pa.float64(),
            "longitude": pa.float64(),
            "caption": pa.string(),
            "thumbnail": pa.binary(),
            "vector": pa.list_(pa.float16(), width),
            "prior": pa.float32(),
        }
        key = pa.field("key", pa.string(), nullable=False)  # as a primary key must be
        return pa.schema([key, *columns.items()])


class UnusableIndexError(ValueError):
    """An index is damaged, of another version, or not of the model at hand: it has to be made anew."""


class UnwritableIndexError(ValueError):
    """An index cannot be written, since a disk is full or a folder is read-only."""


class Known(NamedTuple):
    """What identifies an image in an index, see `Entry`, and the digest of its bytes."""

    source: str
    size: int
    mtime_ns: int
    caption: str | None
    digest: str

    @property
    def state(self) -> tuple[int, int, str | None]:
        """As in `Entry`."""
        return self.size, self.mtime_ns, self.caption


def describe_model(encoder: DualEncoder) -> str:
    """Return the digest of all that the vectors and priors of images depend on."""
    bank = encoder.bank
    parts = [encoder.weights_sha256 or hash_weights(encoder.model), encoder.describe()]
    if bank is not None:
        parts.append(hashlib.sha256(bank.texts.numpy().tobytes()).hexdigest())
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class Index:
    """Images that can be searched; see `clipmini.open_index`.

    Args:
        path: a folder, or an address of object storage, such as s3://bucket/photos.
        model: the model, if it has moved since the index was made; or a model that is loaded already.
        engine: what computes it, one of `ENGINES`.

    Raises:
        ValueError: there is no index, or it is damaged, of a later version, or not of this model.
    """

    def __init__(self, path: str | Path, model: Any = None, engine: str = "auto") -> None:
        self.path, self.engine = _absolute(path), engine
        if not is_index(self.path):
            raise ValueError(
                f"{path} is no index: it has no {MANIFEST_FILE}. Make one: clipmini index MODEL FOLDER --out {path}"
            )
        self.manifest = _read_manifest(self.path)
        self._encoder: DualEncoder | None = None
        self._model = self.manifest.model if model is None else model
        with _reading(self.path):
            self.table = lancedb.connect(self.path).open_table(TABLE)
            if self.table.schema != self.manifest.schema:
                raise ValueError("its table has other columns than its manifest says")
        if isinstance(self._model, (str, Path)):
            self._check_weights(self._model)

    @classmethod
    def create(cls, path: str | Path, model: Any, engine: str = "auto") -> "Index":
        """Make an index without images, or open the one that another process has made meanwhile.

        Args:
            path: a folder that does not exist or is empty, or an address.
            model: as in `load_encoder`; or an encoder.
            engine: see there.

        Raises:
            ValueError: the place holds other files or another table, cannot be written, or the model cannot be loaded.
        """
        path = _absolute(path)
        check_utf8(path)
        if "://" not in path:
            _check_place(Path(path))
        encoder = load_encoder(model, engine)
        with _locked(path):
            if not is_index(path):
                manifest = Manifest(
                    _name_of(model, encoder),
                    describe_model(encoder),
                    encoder.weights_sha256,
                    encoder.encode_texts(["a"]).shape[1],
                    has_priors=encoder.bank is not None,
                )
                with _writing(path):
                    database = lancedb.connect(path)
                    is_left, num_rows = TABLE in database.list_tables().tables, 0
                    with suppress(ValueError):  # there is none, or a run that was killed here has only begun one
                        num_rows = database.open_table(TABLE).count_rows()
                if num_rows:
                    raise ValueError(f"{path} holds a table {TABLE!r} that is no index; name another place.")
                with _writing(path):
                    mode: Any = "overwrite" if is_left else "create"
                    table: Any = database.create_table(TABLE, schema=manifest.schema, mode=mode)
                    # It keeps two writers from adding an image twice; not so where the column also has a scalar index.
                    table.set_unenforced_primary_key("key")
                    _write_manifest(path, manifest)  # last: without it, there is no index
        return cls(path, encoder, engine)

    def __len__(self) -> int:
        return self.table.count_rows()

    def __repr__(self) -> str:
        return f"<index of {len(self):,} images in {self.path}, made with {self.manifest.model}>"

    @property
    def model_name(self) -> str:
        """What to load the model by, also in another process."""
        return str(self._model) if isinstance(self._model, (str, Path)) else self.manifest.model

    @property
    def encoder(self) -> DualEncoder:
        """The model, which is loaded when it is first needed.

        Raises:
            UnusableIndexError: it is not the one that made the index.
            ValueError: it cannot be loaded.
        """
        if self._encoder is None:
            try:
                model = self._model
                encoder = model if isinstance(model, DualEncoder) else load_encoder(model, self.engine)
            except ValueError as error:
                raise ValueError(
                    f"The model of the index {self.path} cannot be loaded: {error} If it has moved, name it (--model)."
                ) from error
            if describe_model(encoder) != self.manifest.model_sha256:
                raise self._other_model(self._model)
            self._encoder = encoder
        return self._encoder

    def _check_weights(self, model: str | Path) -> None:
        """Check a model as far as is possible without the seconds that loading it takes."""
        digests = weights_sha256(Path(model).expanduser()), self.manifest.weights_sha256
        if None not in digests and digests[0] != digests[1]:
            raise self._other_model(model)
        if None in digests and str(model) != self.manifest.model:
            _ = self.encoder

    def _other_model(self, model: Any) -> "UnusableIndexError":
        return UnusableIndexError(
            f"The index {self.path} was made with {self.manifest.model}, and {getattr(model, 'name', model)} is "
            "another model, or another version of it: their vectors cannot be compared. Use that model, with the "
            f"engine that made the index (here it is {self.engine}), or make a new index."
        )

    def add(self, *sources: str | Path, strict: bool = False, ray: bool = False) -> "Changes":
        """Embed what is new or changed in some sources, and drop what is gone from them.

        Args:
            sources: folders, image files, tables or data sets; `list_images` says more.
            strict: raise an error at the first image that cannot be read, instead of leaving it out.
            ray: embed on a Ray cluster, see `update_index_with_ray`, instead of on this machine.

        Returns:
            What has changed, and what was skipped.

        Raises:
            ValueError: as `update_index` does; or Ray is not installed.
        """
        if not ray:
            from .update import update_index

            return update_index(self, sources, Skipped(strict))
        try:
            from .ray_engine import update_index_with_ray
        except ModuleNotFoundError as error:
            raise ValueError(f"Ray needs {error.name}: pip install 'clipmini[ray]'.") from None
        return update_index_with_ray(self, sources, Skipped(strict))

    def search(
        self,
        *queries: str | Image.Image,
        top: int = 9,
        plus: Sequence[str | Image.Image] = (),
        minus: Sequence[str | Image.Image] = (),
        where: str | None = None,
        collapse: bool = False,
    ) -> list[Hits]:
        """Find the images that fit best.

        Args:
            queries: words, `image:` and the path of an image, or Pillow images.
            top: how many images to find for each query; fewer if there are fewer.
            plus: words or images to add to each query.
            minus: words or images to subtract from each query.
            where: a condition in SQL on the columns, such as "width > 1000 and date >= '2024-01-01'".
            collapse: of near-copies, show the best alone.

        Returns:
            The hits of each query, the best first. Words are scored without hubs if the index has priors.

        Raises:
            ValueError: a query, `top` or `where` is not allowed, the model is not that of the index, or the index is
                damaged.
        """
        check_queries([*queries, *plus, *minus], top)
        self._refresh()
        top = min(top, max(1, len(self)))
        if where is not None:
            self._check_condition(where)
        found = []
        for query in embed_queries(self.encoder, queries, plus, minus, self._vector_of):
            scoring = NORMALIZED if query.is_words and self.manifest.has_priors else COSINE
            vector = np.zeros(self.manifest.schema.field("vector").type.list_size, dtype=np.float32)
            vector[: len(query.vector)] = query.vector.numpy()
            vector[len(query.vector)] = scoring == NORMALIZED
            rows = self._nearest(vector, query.is_words, SEVERAL * top if collapse else top, where)
            embeds = normalize(torch.from_numpy(stack(rows["vector"])[:, : self.manifest.num_dimensions]))
            priors = torch.tensor(rows["prior"].to_numpy()) if scoring == NORMALIZED else None
            images = [_image_of(row) for row in rows.select(["key", "thumbnail"]).to_pylist()]
            hits = rank(images, embeds, query.vector, top, priors, collapse)
            found.append(Hits(query.text, hits, scoring=scoring))
        return found

    def _nearest(self, vector: np.ndarray, is_words: bool, num_wanted: int, where: str | None) -> pa.Table:
        kind = "words" if is_words else "images"
        with _reading(self.path):
            search = nearest(self.table, vector, kind, num_wanted, self.manifest.tuning, where)
            return search.select(["key", "vector", "prior", "thumbnail", "_distance"]).to_arrow()

    def _check_condition(self, where: str) -> None:
        try:
            self.table.count_rows(where)  # looks at all rows: some may be of no date or number
        except Exception as error:
            if "LanceError(IO)" in str(error):
                raise _damaged(self.path, error) from error
            raise ValueError(
                f"The condition {where!r} cannot be used: {_reason(error)}. Write SQL on the columns {SHOWN}, such as "
                "\"width > 1000 and date >= '2024-01-01'\"."
            ) from None

    def _vector_of(self, name: str) -> Tensor | None:
        """Return the embedding of an image in the index, by its path or key."""
        rows = self.select([name, os.path.abspath(name)], "key", ["vector"])
        return torch.from_numpy(stack(rows["vector"])[0, : self.manifest.num_dimensions]) if len(rows) else None

    def select(self, values: Iterable[str], column: str, columns: Sequence[str]) -> pa.Table:
        """Return some columns of the rows that have one of some values in a column of text."""
        with _reading(self.path):
            search = self.table.search().where(_is_one_of(column, values)).limit(None)
            return search.select(list(columns)).to_arrow()

    def known(self) -> dict[str, Known]:
        """Return what identifies every image in the index, by its key."""
        with _reading(self.path):
            rows = self.table.search().select(["key", *Known._fields]).limit(None).to_arrow()
        columns = (rows[name].to_pylist() for name in Known._fields)
        return dict(zip(rows["key"].to_pylist(), map(Known, *columns), strict=True))

    def vectors_of(self, digests: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return the embeddings (N, D) and the priors (N,) of images that are in the index, by their digests."""
        if not digests:
            return torch.empty(0, self.manifest.num_dimensions), torch.empty(0)
        rows = self.select(set(digests), "digest", ["digest", "vector", "prior"])
        place = {digest: row for row, digest in enumerate(rows["digest"].to_pylist())}
        order = [place[digest] for digest in digests]
        embeds = stack(rows["vector"])[order, : self.manifest.num_dimensions]
        return torch.from_numpy(embeds), torch.from_numpy(rows["prior"].to_numpy()[order])

    def write(self, rows: Sequence[Mapping[str, Any]], embeds: Tensor, priors: Tensor) -> None:
        """Write rows in one transaction; a row with the key of another replaces it.

        Args:
            rows: the columns but `vector` and `prior`; no two with one key.
            embeds: (N, D) embeddings of length 1.
            priors: (N,) priors, 0 without a bank.

        Raises:
            ValueError: the table cannot be written, as on a full disk.
        """
        schema, num_dimensions = self.manifest.schema, self.manifest.num_dimensions
        vectors = np.zeros((len(rows), schema.field("vector").type.list_size), dtype=np.float16)
        vectors[:, :num_dimensions], vectors[:, num_dimensions] = embeds.numpy(), -priors.numpy()
        columns = {
            name: pa.array([row.get(name) for row in rows], schema.field(name).type)
            for name in schema.names
            if name not in ("vector", "prior")
        }
        columns["vector"] = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        columns["prior"] = pa.array(priors.numpy(), pa.float32())
        merge = self.table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all()
        with _writing(self.path):
            merge.execute(pa.table(columns, schema=schema))

    def optimize(self) -> None:
        """Join what many transactions have written, and bring the vector index up to date.

        Raises:
            ValueError: the table cannot be written.
        """

        def load_captions() -> np.ndarray | None:
            return None if self.encoder.bank is None else self.encoder.bank.texts.numpy()

        with _writing(self.path):
            tuning = update_vector_index(self.table, self.manifest.num_dimensions, load_captions, self.manifest.tuning)
            if tuning != self.manifest.tuning:
                self.manifest = replace(self.manifest, tuning=tuning)
                _write_manifest(self.path, self.manifest)

    def _refresh(self) -> None:
        """Look at what other processes have written since; what they have replaced is removed after a while."""
        self.manifest = _read_manifest(self.path)
        with _reading(self.path):
            self.table.checkout_latest()

    def remove_keys(self, keys: Sequence[str]) -> None:
        """Remove the images with some keys.

        Raises:
            ValueError: the table cannot be written.
        """
        for start in range(0, len(keys), NUM_AT_ONCE):
            with _writing(self.path):
                self.table.delete(_is_one_of("key", keys[start : start + NUM_AT_ONCE]))

    def remove(self, where: str) -> int:
        """Remove images from the index; their files stay.

        Args:
            where: a condition in SQL, as in `search`.

        Returns:
            How many were removed.

        Raises:
            ValueError: the condition cannot be used, the index cannot be written, or another process is writing to it.
        """
        self._check_condition(where)
        with self.locked(), _writing(self.path):
            num_images = len(self)
            self.table.delete(where)
            return num_images - len(self)

    def to_datasets(self) -> Dataset:
        """Return the index as a data set: its columns, with each `vector` as the model embedded it, (D,) float16."""
        with _reading(self.path):
            table = self.table.to_arrow()
        table = table if len(table) else self.manifest.schema.empty_table()  # `datasets` takes no column of no chunks
        vectors = np.ascontiguousarray(stack(table["vector"], np.float16)[:, : self.manifest.num_dimensions])
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), vectors.shape[1])
        return Dataset(table.set_column(table.schema.names.index("vector"), "vector", column))

    @contextmanager
    def locked(self, wait: bool = False) -> Iterator[None]:
        """Let no other process on this machine write to the index; a lock ends with the process that holds it.

        Args:
            wait: for another process that is writing.

        Raises:
            ValueError: another process is writing.
        """
        with _locked(self.path, wait):
            self._refresh()
            yield


@contextmanager
def _locked(path: str, wait: bool = False) -> Iterator[None]:
    file = Path(path, LOCK_FILE)
    if "://" in path:
        file = cache_root() / "locks" / hashlib.sha256(path.encode()).hexdigest()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(file, timeout=-1 if wait else 0):
            remove_leftovers(file.parent)
            yield
    except Timeout:
        raise ValueError(f"Another process is writing to {path}; wait until it is done.") from None
    except OSError as error:
        raise UnwritableIndexError(f"{path} cannot be written: {error.strerror}.") from error


def _check_place(folder: Path) -> None:
    """Check that a folder for a new index does not exist, or holds no more than what a killed run leaves there."""
    remove_leftovers(folder)
    others = sorted({file.name for file in folder.iterdir()} - OWN_NAMES) if folder.is_dir() else []
    if others or folder.is_file():
        problem = f"holds other files, such as {others[0]}" if others else "is a file"
        raise ValueError(f"{folder} {problem}; name a folder that does not exist, or an index.")


def _name_of(model: Any, encoder: DualEncoder) -> str:
    """Return what to load a model by later, from any folder."""
    if not isinstance(model, (str, Path)):
        return encoder.name
    name = expand(model)
    return os.path.abspath(name) if Path(name).exists() else name


def _absolute(path: str | Path) -> str:
    return str(path) if "://" in str(path) else os.path.abspath(os.path.expanduser(path))


def _read_manifest(path: str) -> Manifest:
    try:
        if "://" in path:
            with fsspec.open(f"{path}/{MANIFEST_FILE}", mode="rt", encoding="utf-8") as file:
                content = file.read()
        else:
            content = Path(path, MANIFEST_FILE).read_text(encoding="utf-8")
        values = json.loads(content)
        version = values["schema_version"]
        if version == SCHEMA_VERSION:
            manifest = Manifest(**{item.name: values[item.name] for item in fields(Manifest)})
            return replace(manifest, tuning=manifest.tuning and Tuning(**values["tuning"]))
    except (ValueError, KeyError, TypeError, OSError, RecursionError) as error:
        raise _damaged(path, error) from error
    raise UnusableIndexError(
        f"{path} is an index of version {version!r}, and this clipmini reads version {SCHEMA_VERSION}; make it anew, "
        "or install the clipmini that made it."
    )


def _write_manifest(path: str, manifest: Manifest) -> None:
    content = json.dumps(asdict(manifest), indent=2) + "\n"
    if "://" in path:  # object storage replaces a file whole
        with fsspec.open(f"{path}/{MANIFEST_FILE}", mode="wt", encoding="utf-8") as file:
            file.write(content)
        return
    with atomic_write(Path(path, MANIFEST_FILE)) as temporary:
        temporary.write_text(content, encoding="utf-8")


@contextmanager
def _reading(path: str) -> Iterator[None]:
    """Say in a sentence what is wrong with a table that cannot be read."""
    try:
        yield
    except Exception as error:
        raise _damaged(path, error) from error


@contextmanager
def _writing(path: str) -> Iterator[None]:
    """Likewise for one that cannot be written."""
    try:
        yield
    except Exception as error:
        raise UnwritableIndexError(
            f"The index {path} cannot be written: {_reason(error)}. What was in it before is safe; once there is "
            "room, and permission to write, run the same command again."
        ) from error


def _damaged(path: str, error: Exception) -> UnusableIndexError:
    return UnusableIndexError(
        f"The index {path} is incomplete or damaged: {_reason(error)}. Remove it, and make it anew."
    )


def _reason(error: Exception) -> str:
    """Return what a library of Rust says, without the place in its source."""
    return first_sentence(error).partition(", /")[0].removeprefix("Invalid input, ")


def _is_one_of(column: str, values: Iterable[str]) -> str:
    quoted = ", ".join("'" + value.replace("'", "''") + "'" for value in values)
    return f"{column} IN ({quoted})"


def _image_of(row: Mapping[str, Any]) -> Path | Image.Image:
    if row["thumbnail"] is None:
        return Path(row["key"])
    image = Image.open(BytesIO(row["thumbnail"]))
    image.filename = row["key"]  # as Pillow names an image of a file
    return image
