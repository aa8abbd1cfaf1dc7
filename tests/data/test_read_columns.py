"""Columns are read whole as they are row by row, whatever was selected and however a data set is formatted."""

import numpy as np
import pytest
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature

from clipmini.data.columns import captions_in, join_captions
from clipmini.data.pairs import PairDataset
from clipmini.data.scan import read_columns, read_paths

NUM_ROWS = 2500  # more than are read at once


@pytest.fixture(scope="module")
def rows():
    features = {"image": ImageFeature(decode=False), "captions": List(Value("string")), "image_id": Value("int64")}
    columns = {
        "image": [{"bytes": b"x" if row % 3 or row % 2 == 0 else None, "path": f"{row}.png" if row % 2 else None}
                  for row in range(NUM_ROWS)],
        "captions": [[f"caption {row} {number}" for number in range(1 + row % 4)] for row in range(NUM_ROWS)],
        "image_id": [7 * row for row in range(NUM_ROWS)],
    }  # fmt: skip
    return Dataset.from_dict(columns, features=Features(features))


def some_of(rows, kind):
    order = np.random.default_rng(0).permutation(NUM_ROWS)[:1500]
    return {
        "all": rows,
        "some": rows.select(order),
        "a range": rows.select(range(990, 1010)),
        "joined": concatenate_datasets([rows.select(order), rows]),
        "none": rows.select([]),
        "in a format": rows.select(order).with_format("numpy"),
    }[kind]


@pytest.mark.parametrize("kind", ["all", "some", "a range", "joined", "none", "in a format"])
def test_columns_are_those_of_the_rows(rows, kind):
    chosen = some_of(rows, kind)
    plain = chosen.with_format(None)
    columns = read_columns(chosen, "captions", "image_id")
    assert columns.to_pydict() == {name: list(plain[name]) for name in ("captions", "image_id")}
    assert list(read_paths(chosen)) == [image["path"] for image in plain["image"]]

    pairs = PairDataset(chosen)
    counts = [len(captions) for captions in plain["captions"]]
    assert pairs.image_ids.tolist() == list(plain["image_id"])
    assert pairs.num_captions.tolist() == counts
    assert pairs.caption_starts.tolist() == [sum(counts[:row]) for row in range(len(counts) + 1)]
    assert pairs.captions == [caption for captions in plain["captions"] for caption in captions]
    assert pairs.image_of_captions().tolist() == [row for row, count in enumerate(counts) for _ in range(count)]
    assert len(pairs) == len(chosen)


def test_captions_of_several_columns_come_row_by_row_and_in_the_order_of_the_columns():
    texts = [
        [f"{name} {row}" if (row + place) % 3 else None for row in range(200)] for place, name in enumerate("abc")
    ]
    joined = join_captions([captions_in(column) for column in texts], 200)
    assert joined.to_pylist() == [[text for text in row if text] for row in zip(*texts, strict=True)]
