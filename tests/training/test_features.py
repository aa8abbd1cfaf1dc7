import json
import logging
import multiprocessing
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets import Image as ImageFeature
from torch import nn

from clipmini.files import cache_root
from clipmini.training import features as feature_cache
from clipmini.training.features import cached_array, hash_rows, hash_weights

SHAPE = (10, 2, 3)
ROWS = np.arange(60, dtype=np.float32).reshape(SHAPE)
# Children that share memory and need no imports of their own; they compute nothing with torch.
fork = multiprocessing.get_context("fork")


class Compute:
    """Gives rows of ROWS, and notes which."""

    def __init__(self):
        self.asked = []

    def __call__(self, start, stop):
        self.asked.append((start, stop))
        return ROWS[start:stop]


def cached(folder, compute, key=None, shape=SHAPE, dtype="float32", chunk_rows=4):
    return cached_array(folder, key or {"data": "abc"}, shape, dtype, compute, chunk_rows, "numbers")


def place_in(folder):
    (place,) = folder.iterdir()
    return place


def test_the_array_is_computed_in_chunks_once(tmp_path):
    compute = Compute()
    array = cached(tmp_path, compute)
    assert compute.asked == [(0, 4), (4, 8), (8, 10)]
    np.testing.assert_array_equal(array, ROWS)
    assert isinstance(array, np.memmap)
    assert not array.flags.writeable
    again = Compute()
    np.testing.assert_array_equal(cached(tmp_path, again), ROWS)
    assert again.asked == []


def test_the_key_can_be_read_by_people(tmp_path):
    cached(tmp_path, Compute(), key={"weights": "f00", "data": "bä"})
    readable = json.loads((place_in(tmp_path) / "key.json").read_text())
    assert readable == {"key": {"weights": "f00", "data": "bä"}, "shape": [10, 2, 3], "dtype": "<f4"}


@pytest.mark.parametrize(
    "other", [{"key": {"data": "abd"}}, {"key": {"date": "abc"}}, {"dtype": "float16"}, {"shape": (8, 2, 3)}]
)
def test_another_key_is_computed_and_the_old_array_stays(tmp_path, other):
    first, second = Compute(), Compute()
    old = cached(tmp_path, first)
    new = cached(tmp_path, second, **other)
    assert second.asked[0] == (0, 4)
    np.testing.assert_array_equal(new, ROWS[: len(new)])
    assert new.dtype == other.get("dtype", "float32")
    np.testing.assert_array_equal(old, ROWS)
    assert len(list(tmp_path.iterdir())) == 2


def test_the_order_of_the_key_does_not_matter(tmp_path):
    cached(tmp_path, Compute(), key={"a": "1", "b": "2"})
    again = Compute()
    cached(tmp_path, again, key={"b": "2", "a": "1"})
    assert again.asked == []


def die(*_args, **_kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def run_and_die(folder, moment, num_whole):
    """Compute, and be killed at a moment of the chunk that follows `num_whole` whole ones."""
    compute = Compute()

    def dying(original):
        return lambda *args: die() if len(compute.asked) > num_whole else original(*args)

    def compute_or_die(start, stop):
        rows = compute(start, stop)
        return dying(lambda: rows)() if moment == "compute" else rows

    # the child's own copies of these modules
    if moment == "fsync":
        os.fsync = dying(os.fsync)
    elif moment == "replace":
        Path.replace = dying(Path.replace)
    cached(folder, compute_or_die)


@pytest.mark.parametrize("moment", ["compute", "fsync", "replace"])
@pytest.mark.parametrize("num_whole", [0, 1, 2])
def test_a_killed_run_resumes_after_the_last_whole_chunk(tmp_path, moment, num_whole):
    child = fork.Process(target=run_and_die, args=(tmp_path, moment, num_whole))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL
    again = Compute()
    np.testing.assert_array_equal(cached(tmp_path, again), ROWS)
    assert again.asked == [(0, 4), (4, 8), (8, 10)][num_whole:]


def interrupt_after(folder, num_chunks):
    chunks = iter([ROWS[:4], ROWS[4:8], ROWS[8:]][:num_chunks])
    with pytest.raises(StopIteration):
        cached(folder, lambda start, stop: next(chunks))


def test_rows_are_on_disk_before_they_are_said_to_be(tmp_path, monkeypatch):
    events = []
    fsync, replace = os.fsync, Path.replace

    def note_fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        events.extend(path.name for path in place_in(tmp_path).iterdir() if path.stat().st_ino == inode)
        fsync(descriptor)

    def note_replace(path, target):
        events.append(f"-> {target.name}")
        return replace(path, target)

    monkeypatch.setattr(os, "fsync", note_fsync)
    monkeypatch.setattr(Path, "replace", note_replace)
    cached(tmp_path, Compute(), chunk_rows=5)
    assert events[-6:] == ["array.npy", "progress.partial", "-> progress.json"] * 2


def test_a_run_stopped_before_its_first_row_is_nothing_damaged(tmp_path, caplog):
    interrupt_after(tmp_path, 0)
    np.testing.assert_array_equal(cached(tmp_path, Compute()), ROWS)
    assert caplog.text == ""


def test_another_chunk_size_resumes_too(tmp_path):
    interrupt_after(tmp_path, 1)
    again = Compute()
    np.testing.assert_array_equal(cached(tmp_path, again, chunk_rows=3), ROWS)
    assert again.asked == [(4, 7), (7, 10)]


def truncate(place):
    os.truncate(place / "array.npy", 300)


def break_header(place):
    with (place / "array.npy").open("r+b") as file:
        file.seek(20)
        file.write(b"\xff(((''")


def other_array(place):
    np.save(place / "array.npy", ROWS[:, :1])


DAMAGES = {
    "truncated": truncate,
    "header": break_header,
    "other array": other_array,
    "no array": lambda place: (place / "array.npy").unlink(),
    "no marker": lambda place: (place / "progress.json").unlink(),
    "empty marker": lambda place: (place / "progress.json").write_text(""),
    "list": lambda place: (place / "progress.json").write_text("[4]"),
    "beyond": lambda place: (place / "progress.json").write_text('{"rows": 11}'),
    "negative": lambda place: (place / "progress.json").write_text('{"rows": -4}'),
    "text": lambda place: (place / "progress.json").write_text('{"rows": "4"}'),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
@pytest.mark.parametrize("complete", [True, False])
def test_what_is_damaged_is_computed_anew_with_a_warning(tmp_path, caplog, damage, complete):
    if complete:
        cached(tmp_path, Compute())
    else:
        interrupt_after(tmp_path, 1)
    damage(place_in(tmp_path))
    again = Compute()
    np.testing.assert_array_equal(cached(tmp_path, again), ROWS)
    assert again.asked == [(0, 4), (4, 8), (8, 10)]
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert str(place_in(tmp_path)) in warning.getMessage()
    assert "incomplete or damaged" in warning.getMessage()


def test_whoever_still_reads_a_damaged_array_is_not_disturbed(tmp_path):
    reader = cached(tmp_path, Compute())
    (place_in(tmp_path) / "progress.json").unlink()
    cached(tmp_path, lambda start, stop: ROWS[start:stop] + 1)
    np.testing.assert_array_equal(reader, ROWS)


def compute_slowly(folder, log):
    def compute(start, stop):
        with log.open("a") as file:
            file.write(f"{start} ")
        time.sleep(0.05)
        return ROWS[start:stop]

    np.testing.assert_array_equal(cached(folder, compute), ROWS)


def test_of_two_processes_one_computes_and_the_other_waits(tmp_path):
    log = tmp_path / "log"
    children = [fork.Process(target=compute_slowly, args=(tmp_path / "cache", log)) for _ in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert log.read_text() == "0 4 8 "


def test_too_little_room_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2000))
    compute = Compute()
    with pytest.raises(ValueError, match=r"numbers: the cache needs 2\.40kB in .*2\.00kB are free: .*CLIPMINI_CACHE"):
        cached(tmp_path, compute, shape=(100, 2, 3))
    assert compute.asked == []
    assert not (place_in(tmp_path) / "array.npy").exists()
    cached(tmp_path, compute)  # 240 bytes


def test_only_what_is_missing_needs_room(tmp_path, monkeypatch):
    interrupt_after(tmp_path, 2)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=48))
    np.testing.assert_array_equal(cached(tmp_path, Compute()), ROWS)


def test_a_folder_that_cannot_be_made_is_a_value_error():
    with pytest.raises(ValueError, match="CLIPMINI_CACHE"):
        cached(Path(__file__), Compute())


def test_rows_of_a_wrong_shape_are_not_broadcast(tmp_path):
    with pytest.raises(AssertionError, match="shape"):
        cached(tmp_path, lambda start, stop: ROWS[start : start + 1])


def test_the_log_and_the_bar_say_what_happens(tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO, logger=feature_cache.__name__)
    interrupt_after(tmp_path, 1)
    assert "numbers: computing into" in caplog.text
    assert "0/10" in capsys.readouterr().err
    caplog.clear()
    cached(tmp_path, Compute())
    assert "numbers: resumed at row 4" in caplog.text
    first_bar = capsys.readouterr().err.split("\r")[1]
    assert "numbers" in first_bar
    assert "4/10" in first_bar
    caplog.clear()
    cached(tmp_path, Compute())
    assert "numbers: reused" in caplog.text
    assert capsys.readouterr().err == ""


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "a"))
    assert cache_root() == tmp_path / "a"
    assert cache_root(tmp_path / "b") == tmp_path / "b"
    monkeypatch.delenv("CLIPMINI_CACHE")
    assert cache_root() == Path.home() / ".cache" / "clipmini"


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_equal_weights_have_equal_hashes():
    assert hash_weights(small_net()) == hash_weights(small_net())
    assert hash_weights(small_net()) == hash_weights(small_net().to(memory_format=torch.channels_last))
    assert hash_weights(small_net()) == hash_weights(small_net().requires_grad_(False).eval())


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"])
def test_any_changed_number_changes_the_hash_of_weights(name):
    net = small_net()
    net.state_dict()[name].view(-1)[-1:] += 1
    assert hash_weights(net) != hash_weights(small_net())


def test_names_shapes_and_dtypes_are_part_of_the_hash_of_weights():
    def holding(name, value):
        module = nn.Module()
        module.register_buffer(name, value)
        return hash_weights(module)

    zeros = torch.zeros(4)
    others = [("b", zeros), ("a", zeros.view(2, 2)), ("a", zeros.view(torch.int32)), ("a", zeros.bfloat16())]
    assert len({holding("a", zeros), *(holding(*other) for other in others)}) == 5


FEATURES = Features(
    {"image": ImageFeature(decode=False), "captions": List(Value("string")), "image_id": Value("int64")}
)
FIRST = {"image": {"bytes": b"one", "path": None}, "captions": ["a", "bc"], "image_id": 0}
SECOND = {"image": {"bytes": b"three", "path": "x.jpg"}, "captions": ["", "döf"], "image_id": 7}


def pairs_of(*rows):
    return Dataset.from_list(list(rows), features=FEATURES)


@pytest.mark.parametrize(
    "rows",
    [
        [FIRST],
        [SECOND, FIRST],
        [FIRST, SECOND, SECOND],
        [FIRST, {**SECOND, "image": {"bytes": b"threE", "path": "x.jpg"}}],
        [FIRST, {**SECOND, "image": {"bytes": None, "path": "https://x.org/x.jpg"}}],
        [FIRST, {**SECOND, "captions": ["", "dof"]}],
        [FIRST, {**SECOND, "captions": ["döf", ""]}],
        [{**FIRST, "captions": ["a", "bc", ""]}, {**SECOND, "captions": ["döf"]}],
        [{**FIRST, "captions": ["ab", "c"]}, SECOND],
        [{**FIRST, "image": {"bytes": b"onet", "path": None}}, {**SECOND, "image": {"bytes": b"hree", "path": None}}],
    ],
)
def test_any_change_of_the_rows_changes_their_hash(rows):
    assert hash_rows(pairs_of(*rows)) != hash_rows(pairs_of(FIRST, SECOND))


def test_where_and_in_what_pieces_rows_lie_does_not_matter(toy_pairs, tmp_path, monkeypatch):
    expected = hash_rows(toy_pairs)
    halves = [toy_pairs.select(range(5)), toy_pairs.select(range(5, 12))]
    assert hash_rows(concatenate_datasets(halves)) == expected
    reversed_twice = Dataset.from_list(list(toy_pairs)[::-1], features=toy_pairs.features).select(range(11, -1, -1))
    assert hash_rows(reversed_twice) == expected
    toy_pairs.save_to_disk(tmp_path / "pairs", num_shards=3)
    assert hash_rows(Dataset.load_from_disk(tmp_path / "pairs")) == expected
    assert hash_rows(toy_pairs.with_format("numpy", columns=["image_id"])) == expected
    monkeypatch.setattr(feature_cache, "ROWS_PER_BATCH", 5)
    assert hash_rows(toy_pairs) == expected


def test_rows_are_hashed_through_the_selection(toy_pairs):
    selected = toy_pairs.select([3, 1, 8])
    assert hash_rows(selected) == hash_rows(Dataset.from_list(list(selected), features=toy_pairs.features))
    assert len({hash_rows(toy_pairs), hash_rows(selected), hash_rows(toy_pairs.select([1, 3, 8]))}) == 3
    assert hash_rows(toy_pairs.shuffle(seed=1)) != hash_rows(toy_pairs)


def test_only_the_columns_that_matter_are_hashed():
    other_captions = pairs_of({**FIRST, "captions": ["z"]}, SECOND)
    assert hash_rows(other_captions, ("image",)) == hash_rows(pairs_of(FIRST, SECOND), ("image",))
    assert hash_rows(other_captions, ("captions",)) != hash_rows(pairs_of(FIRST, SECOND), ("captions",))
    assert len({hash_rows(pairs_of({**FIRST, "captions": [""] * count})) for count in (1, 2)}) == 2


def test_an_image_in_a_file_is_known_by_path_size_and_time(tmp_path):
    def hash_of(path):
        return hash_rows(pairs_of({**FIRST, "image": {"bytes": None, "path": str(path)}}))

    image, other = tmp_path / "a.jpg", tmp_path / "b.jpg"
    for path in (image, other):
        path.write_bytes(b"1234")
        os.utime(path, ns=(10, 10))
    first = hash_of(image)
    assert hash_of(image) == first
    assert hash_of(other) != first
    os.utime(image, ns=(10, 11))
    assert hash_of(image) != first
    image.write_bytes(b"12345")
    os.utime(image, ns=(10, 10))
    assert hash_of(image) != first
    image.unlink()
    with pytest.raises(ValueError, match=r"a\.jpg cannot be read \(No such file"):
        hash_of(image)


def test_a_column_that_cannot_be_hashed_is_refused():
    with pytest.raises(ValueError, match="'flags' holds bool"):
        hash_rows(Dataset.from_dict({"flags": [True]}), ("flags",))
