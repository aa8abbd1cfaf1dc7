import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

import clipmini

lancedb = pytest.importorskip("lancedb")

from clipmini.indexing import vectors  # noqa: E402
from clipmini.indexing.vectors import Tuning, nearest, sample_queries, update_vector_index  # noqa: E402

NUM_DIMENSIONS, WIDTH = 31, 32


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def make_rows(start, stop, seed=0):
    """Rows of an index: embeddings around 40 centers, a prior in the last dimension."""
    centers = unit(np.random.default_rng(0).standard_normal((40, NUM_DIMENSIONS)))
    generator = np.random.default_rng(start + seed)
    embeds = centers[generator.integers(40, size=stop - start)]
    embeds = unit(embeds + 0.15 * generator.standard_normal(embeds.shape))
    rows = np.concatenate([embeds, -0.1 * generator.random((stop - start, 1))], axis=1).astype(np.float16)
    column = pa.FixedSizeListArray.from_arrays(pa.array(rows.ravel()), WIDTH)
    return pa.table({"key": [str(key) for key in range(start, stop)], "number": range(start, stop), "vector": column})


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(vectors, "FLAT_VALUES", 1000 * WIDTH)
    monkeypatch.setattr(vectors, "NUM_QUERIES", 40)
    return lancedb.connect(tmp_path).create_table("images", make_rows(0, 2000))


def update(table, tuning=None):
    return update_vector_index(table, NUM_DIMENSIONS, lambda: None, tuning)


def ask(table, query, tuning, kind="images", top=10, where=None):
    rows = nearest(table, query, kind, top, tuning, where).select(["key", "_distance"]).to_arrow()
    return rows["key"].to_pylist()


def uses_index(table, query, tuning, **options):
    return "ANN" in nearest(table, query, "images", 10, tuning, **options).select(["_distance"]).explain_plan()


def make_query(table):
    return sample_queries(table, NUM_DIMENSIONS, None)["images"][0]


def exact(table, query, top=10):
    rows = table.to_arrow()
    stored = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH).astype(np.float32)
    return [rows["key"][int(row)].as_py() for row in np.argsort(-stored @ query)[:top]]


def test_few_vectors_are_all_compared(table):
    table.delete("number >= 900")
    assert update(table) is None
    assert table.list_indices() == []
    query = sample_queries(table, NUM_DIMENSIONS, None)["words"][0]
    assert ask(table, query, None, "words") == exact(table, query)


def test_of_many_enough_are_found_for_either_kind_of_query(table):
    tuning = update(table)
    assert Tuning(**asdict(tuning)) == tuning
    assert tuning.num_trained == tuning.num_measured == 2000
    assert min(tuning.recall.values()) >= vectors.MIN_RECALL
    others = lancedb.connect(table.uri + "_others").create_table("images", make_rows(5000, 5100))
    for kind, queries in sample_queries(others, NUM_DIMENSIONS, None).items():  # which nothing was measured by
        assert uses_index(table, queries[0], tuning)
        shares = [len({*ask(table, query, tuning, kind)} & {*exact(table, query)}) / 10 for query in queries]
        assert np.mean(shares) >= 0.95  # 40 queries


def test_one_hit_is_the_best_as_often_as_ten_are(table):
    tuning = update(table)
    queries = sample_queries(table, NUM_DIMENSIONS, None)["images"]
    assert np.mean([ask(table, query, tuning, top=1) == exact(table, query, 1) for query in queries]) >= 0.95


def test_as_many_are_found_as_are_asked_for(table):
    query = make_query(table)
    tuning = replace(update(table), num_probes={"images": 1})
    assert len(ask(table, query, tuning, top=1000)) > 900
    assert len(ask(table, query, tuning, top=5000)) == 2000


def test_a_state_that_was_not_measured_is_not_asked(table):
    """As between two writes of a run, or after it was killed there."""
    tuning = update(table)
    query = make_query(table)
    assert uses_index(table, query, tuning)
    assert not uses_index(table, query, None)
    table.create_index("vector", config=vectors.IvfRq(distance_type="dot", num_partitions=4), replace=True)
    assert not uses_index(table, query, tuning)
    assert ask(table, query, tuning) == exact(table, query)
    again = update(table, tuning)
    assert again.index_id != tuning.index_id
    assert uses_index(table, query, again)


def test_new_changed_and_removed_rows_count_at_once_and_are_folded_in_when_they_are_many(table):
    tuning = update(table)
    query = make_query(table)
    best = np.float16(query[:WIDTH] * 1.5)
    table.add(
        pa.table({"key": ["best"], "number": [-1], "vector": pa.array([best], table.schema.field("vector").type)})
    )
    assert ask(table, query, tuning)[0] == "best"
    assert update(table, tuning) == tuning  # a single row waits
    table.delete("key = 'best'")
    assert "best" not in ask(table, query, tuning)

    table.merge_insert("key").when_matched_update_all().when_not_matched_insert_all().execute(make_rows(1900, 2150))
    folded = update(table, tuning)
    assert folded == replace(tuning, index_id=folded.index_id)  # by so few the recall does not change
    assert uses_index(table, query, folded)
    assert table.index_stats("vector_idx").num_unindexed_rows == 0
    assert all_are_found(table, folded)

    table.add(make_rows(2150, 2400))
    measured = update(table, folded)
    assert (measured.num_trained, measured.num_measured) == (2000, 2400)
    table.add(make_rows(2400, 4000))
    assert update(table, measured).num_trained == 4000


def all_are_found(table, tuning):
    """Whether each row is among the best for its own embedding, with all partitions looked into."""
    rows = table.to_arrow()
    stored = rows["vector"].combine_chunks().flatten().to_numpy().reshape(-1, WIDTH).astype(np.float32)
    tuning = replace(tuning, num_probes={"images": 1000}, refine_factor={"images": 50})
    return all(rows["key"][row].as_py() in ask(table, stored[row], tuning) for row in range(0, len(rows), 7))


def test_few_that_fulfill_a_condition_are_all_compared(table):
    tuning = update(table)
    query = make_query(table)
    assert not uses_index(table, query, tuning, where="number < 20")
    assert sorted(map(int, ask(table, query, tuning, top=100, where="number < 20"))) == list(range(20))
    assert uses_index(table, query, tuning, where="number >= 20")
    assert min(map(int, ask(table, query, tuning, where="number >= 900"))) >= 900


def test_equal_rows_are_all_as_good(table):
    rows = table.to_arrow()
    one = pa.FixedSizeListArray.from_arrays(pa.array(np.tile(np.float16(make_query(table)), 2000)), WIDTH)
    table.delete("true")
    table.add(rows.set_column(rows.schema.names.index("vector"), "vector", one))
    assert update(table).recall == {"images": 1.0, "words": 1.0}


def test_small_writes_are_joined_and_what_they_replaced_stays_for_who_reads_it(table):
    reader = lancedb.connect(os.path.dirname(table.uri)).open_table("images")
    for start in range(2000, 2000 + 10 * (vectors.MAX_FRAGMENTS + 2), 10):
        table.add(make_rows(start, start + 10))
    assert table.stats()["fragment_stats"]["num_fragments"] > vectors.MAX_FRAGMENTS
    tuning = update(table)
    assert table.stats()["fragment_stats"]["num_fragments"] == 1
    query = make_query(table)
    assert ask(reader, query, None) == exact(reader, query)
    assert len(reader) == 2000
    assert uses_index(table, query, tuning)


def test_a_vector_index_goes_when_few_rows_are_left(table):
    update(table)
    table.delete("number >= 500")
    assert update(table) is None
    assert table.list_indices() == []


def test_captions_are_the_queries_of_words_where_they_are_known(table):
    captions = np.eye(NUM_DIMENSIONS)[:5] * 3
    words = sample_queries(table, NUM_DIMENSIONS, captions)["words"]
    assert words.tolist() == np.hstack([np.eye(NUM_DIMENSIONS)[:5], np.ones((5, 1))]).tolist()
    sampled = sample_queries(table, NUM_DIMENSIONS, None)
    for kind, prior in (("images", 0), ("words", 1)):
        assert sampled[kind].shape == (40, WIDTH)
        np.testing.assert_allclose(np.linalg.norm(sampled[kind][:, :NUM_DIMENSIONS], axis=1), 1, rtol=1e-5)
        assert (sampled[kind][:, NUM_DIMENSIONS:] == prior).all()


def test_an_index_keeps_its_vector_index_up_to_date_and_an_open_one_follows(tiny_folder, tmp_path, monkeypatch):
    def make_images(start, stop):
        for number in range(start, stop):
            Image.new("RGB", (30, 30), (number, 255 - number, 90)).save(tmp_path / f"images/{number:03}.png")

    (tmp_path / "images").mkdir()
    monkeypatch.setattr(vectors, "FLAT_VALUES", 50 * WIDTH)
    make_images(0, 150)
    writer = clipmini.open_index(tmp_path / "index", tiny_folder)
    writer.add(tmp_path / "images")
    assert writer.manifest.tuning.num_trained == 150
    reader = clipmini.open_index(tmp_path / "index")
    make_images(150, 160)
    writer.add(tmp_path / "images")
    assert len(writer) == 160
    hits = reader.search(f"image:{tmp_path / 'images/155.png'}", "a fish", top=160)
    assert tmp_path / "images/155.png" in [hit.image for hit in hits[0]][:5]
    assert [len(found) for found in hits] == [160, 160]
    shutil.rmtree(tmp_path / "images")
    (tmp_path / "images").mkdir()
    make_images(0, 20)
    writer.add(tmp_path / "images")
    assert (writer.manifest.tuning, len(reader.search("a fish", top=50)[0])) == (None, 20)


PROGRAM = """
import sys, lancedb
from clipmini.indexing import vectors
vectors.FLAT_VALUES, vectors.NUM_QUERIES = 1000 * 32, 40
table = lancedb.connect(sys.argv[1]).open_table("images")
print("ready", flush=True)
while True:
    vectors.update_vector_index(table, 31, lambda: None, None)
"""


@pytest.mark.parametrize("wait_s", [0.05, 0.4])
def test_a_run_that_is_killed_leaves_a_table_that_answers_rightly(table, wait_s):
    folder = os.path.dirname(table.uri)
    tuning = update(table)
    child = subprocess.Popen([sys.executable, "-c", PROGRAM, folder], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"ready\n"
    time.sleep(wait_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    opened = lancedb.connect(folder).open_table("images")
    query = make_query(opened)
    assert {*ask(opened, query, tuning)} >= {*exact(opened, query)[:5]}
    assert uses_index(opened, query, update(opened, tuning))
