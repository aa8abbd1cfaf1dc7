"""What is computed once is kept, found by its key, and never wrong: whatever is killed, damaged, full or shared."""

import errno
import json
import logging
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from torch.utils.data import DataLoader

from clipmini import store
from clipmini.store import clear, digest, spaces, stored_rows

SPACE = {"weights": "f00", "kind": "bä"}
ROWS = np.arange(60, dtype=np.float32).reshape(10, 2, 3)
KEYS = np.stack([np.frombuffer(digest(str(number)), np.uint8) for number in range(10)])
# Children that share memory and need no imports of their own; they compute nothing with torch.
fork = multiprocessing.get_context("fork")


@pytest.fixture(autouse=True)
def rows_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "rows"


@pytest.fixture
def draw():
    """Random numbers that can be drawn again: pytest shows the seed of a test that fails."""
    seed = int(os.environ.get("SEED", time.time()))
    sys.stdout.write(f"SEED={seed}\n")
    return random.Random(seed)


class Compute:
    """Gives some of the rows, and notes which."""

    def __init__(self, rows=ROWS):
        self.rows = rows
        self.asked = []

    def __call__(self, places):
        self.asked.append(places)
        return self.rows[places]


def keep(compute, keys=KEYS, space=SPACE, dtype="float32", chunk_rows=4):
    return stored_rows(space, keys, compute, dtype=dtype, chunk_rows=chunk_rows, description="numbers")


def keep_all(**options):
    """Keep ROWS, and return the places that had to be computed."""
    compute = Compute()
    np.testing.assert_array_equal(keep(compute, **options)[...], ROWS)
    return [place for asked in compute.asked for place in asked]


def chunks_in(folder):
    return sorted(folder.glob("*/*.safetensors"))


def interrupt_after(num_chunks):
    compute = Compute()

    def stop_later(places):
        if len(compute.asked) == num_chunks:
            raise KeyboardInterrupt
        return compute(places)

    with pytest.raises(KeyboardInterrupt):
        keep(stop_later)


class TestDigest:
    def test_exact(self):
        assert digest().hex() == "cae66941d9efbd404e4d88758ea67670"  # BLAKE2b of nothing, 16 bytes long
        assert len(digest(b"a", "b")) == 16

    def test_parts_end_where_they_end(self):
        cut = [("ab",), ("a", "b"), ("", "ab"), ("ab", ""), ("a", "", "b"), (), ("",)]
        assert len({digest(*parts) for parts in cut}) == len(cut)

    def test_any_text_has_a_digest(self):
        assert digest("ä") == digest("ä".encode())
        assert digest("\ud83d") != digest("\udc83")


class TestKeeping:
    def test_rows_are_computed_in_chunks_once(self, rows_folder):
        compute = Compute()
        rows = keep(compute)
        assert compute.asked == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
        assert (rows.shape, rows.dtype, len(rows)) == ((10, 2, 3), np.float32, 10)
        assert keep_all() == []
        assert len(chunks_in(rows_folder)) == 3

    def test_only_added_rows_are_computed_in_any_order(self):
        keep(Compute(), keys=KEYS[:3])
        order = [7, 2, 9, 0, 1, 8]
        compute = Compute(ROWS[order])
        np.testing.assert_array_equal(keep(compute, keys=KEYS[order])[...], ROWS[order])
        assert compute.asked == [[0, 2, 5]]
        assert keep_all() == [3, 4, 5, 6]

    def test_equal_keys_are_computed_once(self):
        order = [3, 3, 1, 3, 1, 0]
        compute = Compute(ROWS[order])
        np.testing.assert_array_equal(keep(compute, keys=KEYS[order])[...], ROWS[order])
        assert compute.asked == [[0, 2, 5]]

    def test_keys_that_end_in_zeros_are_told_apart(self):
        keys = np.zeros((4, 16), np.uint8)
        keys[1, 15], keys[2, 0], keys[3, :2] = 1, 1, (1, 2)
        np.testing.assert_array_equal(keep(Compute(ROWS[:4]), keys=keys)[...], ROWS[:4])
        np.testing.assert_array_equal(keep(Compute(ROWS[:4]), keys=keys[::-1])[...], ROWS[3::-1])

    def test_rows_may_be_numbers(self):
        assert keep(Compute(np.arange(10)), dtype="int32")[3] == 3

    def test_without_keys_there_is_nothing_to_do(self, rows_folder):
        rows = keep(None, keys=KEYS[:0])
        assert (len(rows), rows[...].shape) == (0, (0,))
        assert not rows_folder.exists()

    @pytest.mark.parametrize(
        "other", [{"space": {"weights": "f01", "kind": "bä"}}, {"space": {"weight": "f00"}}, {"dtype": "float16"}]
    )
    def test_another_space_has_rows_of_its_own(self, rows_folder, other):
        old = keep(Compute())
        assert keep_all(**other) == list(range(10))
        np.testing.assert_array_equal(old[...], ROWS)
        assert len(list(rows_folder.iterdir())) == 2
        assert keep_all() == []

    def test_the_order_of_a_space_does_not_matter(self):
        keep(Compute())
        assert keep_all(space=dict(reversed(SPACE.items()))) == []

    def test_people_can_read_what_a_space_is(self, rows_folder):
        keep(Compute())
        (file,) = rows_folder.glob("*/space.json")
        assert json.loads(file.read_text()) == {"description": "numbers", "space": SPACE, "dtype": "<f4"}

    def test_rows_of_another_shape_are_not_broadcast(self):
        with pytest.raises(AssertionError, match="shape"):
            keep(lambda places: ROWS[:1])
        keep(Compute())
        with pytest.raises(AssertionError, match=r"shape \(1, 2\), not \(1, 2, 3\)"):
            keep(lambda places: ROWS[:1, :, 0], keys=np.concatenate([KEYS[:1], np.zeros((1, 16), np.uint8)]))

    def test_the_log_and_the_bar_say_what_happens(self, caplog, capsys):
        caplog.set_level(logging.INFO, logger=store.__name__)
        interrupt_after(1)
        assert "numbers: computing into" in caplog.text
        assert "0/10" in capsys.readouterr().err
        caplog.clear()
        keep_all()
        assert "numbers: resumed with 4 of 10 rows in" in caplog.text
        first_bar = capsys.readouterr().err.split("\r")[1]
        assert "numbers" in first_bar
        assert "4/10" in first_bar
        caplog.clear()
        keep_all()
        assert "numbers: reused from" in caplog.text
        assert capsys.readouterr().err == ""


SEVERAL = ([9, 0, 0, 5], [], np.arange(10) % 3 == 1, np.array([[1, 8], [7, 1]]), slice(2, 9, 3), ...)


class TestReading:
    @pytest.mark.parametrize("index", [3, -1, np.int64(9), *SEVERAL], ids=str)
    def test_any_index(self, index):
        np.testing.assert_array_equal(keep(Compute())[index], ROWS[index])

    @pytest.mark.parametrize("index", [(1, 3), 1, (slice(None), 2), ([0, 1], [4, 0]), ...], ids=str)
    def test_two_leading_dimensions(self, index):
        rows = keep(Compute(), keys=KEYS.reshape(2, 5, 16))
        assert rows.shape == (2, 5, 2, 3)
        np.testing.assert_array_equal(rows[index], ROWS.reshape(2, 5, 2, 3)[index])

    def test_an_index_out_of_range(self):
        rows = keep(Compute())
        for index in (10, (1, 1), [10]):
            with pytest.raises(IndexError):
                rows[index]

    def test_a_row_cannot_be_changed(self):
        with pytest.raises(ValueError, match="read-only"):
            keep(Compute())[3][0] = 1

    def test_no_file_is_held_open(self):
        before = len(os.listdir("/proc/self/fd"))
        rows = keep(Compute(), chunk_rows=1)
        assert len(os.listdir("/proc/self/fd")) == before
        np.testing.assert_array_equal(rows[...], ROWS)

    def test_a_pickle_does_not_hold_the_rows(self):
        keys = np.stack([np.frombuffer(digest(str(number)), np.uint8) for number in range(100)])
        rows = keep(lambda places: np.ones((len(places), 10_000)), keys=keys, chunk_rows=50)
        data = pickle.dumps(rows)
        assert len(data) < 10_000
        np.testing.assert_array_equal(pickle.loads(data)[7], rows[7])

    @pytest.mark.parametrize("context", ["fork", "forkserver"])
    def test_workers_read_the_same(self, context):
        loader = DataLoader(keep(Compute()), batch_size=5, num_workers=1, multiprocessing_context=context)
        np.testing.assert_array_equal(np.concatenate([batch.numpy() for batch in loader]), ROWS)


def compute_and_die(moment, num_whole):
    """Compute, and be killed at a moment of the chunk that follows `num_whole` whole ones."""
    compute = Compute()

    def dying(original):
        def call(*arguments):
            if len(compute.asked) > num_whole:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments)

        return call

    def compute_or_die(places):
        rows = compute(places)
        return dying(np.copy)(rows) if moment == "compute" else rows

    # the child's own copies of these modules
    if moment == "write":
        Path.write_bytes = dying(Path.write_bytes)
    elif moment == "replace":
        Path.replace = dying(Path.replace)
    keep(compute_or_die)


def compute_slowly(log):
    def compute(places):
        with log.open("a") as file:
            file.write(f"{places[0]} ")
        time.sleep(0.05)
        return ROWS[places]

    np.testing.assert_array_equal(keep(compute)[...], ROWS)


def start(target, *arguments):
    child = fork.Process(target=target, args=arguments)
    child.start()
    return child


class TestSeveralProcesses:
    @pytest.mark.parametrize("moment", ["compute", "write", "replace"])
    @pytest.mark.parametrize("num_whole", [0, 1, 2])
    def test_a_killed_run_loses_one_chunk(self, moment, num_whole):
        child = start(compute_and_die, moment, num_whole)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        assert keep_all() == list(range(4 * num_whole, 10))

    def test_a_run_killed_at_any_time_loses_one_chunk(self, tmp_path, draw):
        log = tmp_path / "log"
        for _ in range(5):
            log.write_text("")
            child = start(compute_slowly, log)
            time.sleep(draw.uniform(0, 0.2))
            child.kill()
            child.join()
            num_begun = len(log.read_text().split())
            num_lost = len(keep_all())
            assert 10 - num_lost in (4 * num_begun - 4, min(4 * num_begun, 10)) or num_begun == 0
            clear()

    def test_of_two_processes_one_computes_and_the_other_waits(self, tmp_path):
        children = [start(compute_slowly, tmp_path / "log") for _ in range(2)]
        for child in children:
            child.join()
        assert [child.exitcode for child in children] == [0, 0]
        assert (tmp_path / "log").read_text() == "0 4 8 "

    def test_who_comes_later_waits_too(self, tmp_path):
        log = tmp_path / "log"
        first = start(compute_slowly, log)
        while not log.exists() or len(log.read_text().split()) < 2:  # one chunk is kept, and fewer are missing
            time.sleep(0.001)
        second = start(compute_slowly, log)
        for child in (first, second):
            child.join()
        assert log.read_text() == "0 4 8 "


class TestDamage:
    def test_a_changed_byte_anywhere_is_found(self, rows_folder, caplog, draw):
        keep(Compute())
        size = chunks_in(rows_folder)[1].stat().st_size
        for position in (*range(20), size - 1, *(draw.randrange(size) for _ in range(60))):
            file = draw.choice(chunks_in(rows_folder))
            data = bytearray(file.read_bytes())
            data[min(position, len(data) - 1)] ^= draw.randrange(1, 256)
            file.write_bytes(data)
            caplog.clear()
            assert len(keep_all()) in (2, 4), position
            # In a changed header, other bytes may pass for the keys: these are nobody's, and the file is written anew.
            assert len(caplog.messages) <= 1
            for warning in caplog.messages:
                assert f"{file} is damaged (" in warning
                assert warning.endswith("it is removed, and its rows are computed again")
            assert keep_all() == []

    @pytest.mark.parametrize("size", [0, 5, 100, 200])
    def test_a_truncated_chunk(self, rows_folder, size):
        keep(Compute())
        os.truncate(chunks_in(rows_folder)[0], size)
        assert len(keep_all()) in (2, 4)

    def test_chunks_without_wanted_rows_are_not_digested(self, rows_folder, monkeypatch):
        keep(Compute())
        names = []
        name_of = store._name_of
        monkeypatch.setattr(store, "_name_of", lambda data: names.append(name_of(data)) or names[-1])
        np.testing.assert_array_equal(keep(None, keys=KEYS[4:6])[...], ROWS[4:6])
        assert len(names) == 1

    def test_who_still_reads_is_not_disturbed(self, rows_folder):
        reader = keep(Compute())
        for file in chunks_in(rows_folder):
            file.rename(file.with_name(f"{32 * '0'}.safetensors"))  # no chunk is what its name says
        keep(Compute(ROWS + 1))
        np.testing.assert_array_equal(reader[...], ROWS)


@pytest.fixture
def free_bytes(monkeypatch):
    def set_free(number):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(number, 0, number))

    return set_free


@pytest.fixture
def failing_writes(monkeypatch):
    def fail(path, *arguments, **options):
        raise OSError(number, os.strerror(number), str(path))

    def set_error(error_number):
        nonlocal number
        number = error_number
        for name in ("write_bytes", "write_text"):
            monkeypatch.setattr(Path, name, fail)

    number = 0
    return set_error


class TestRefusals:
    def test_too_little_room_is_said_before_more_is_computed(self, rows_folder, free_bytes):
        free_bytes(300)
        compute = Compute()
        with pytest.raises(ValueError, match=r"numbers: the cache needs 400B in .* 300B are free: .*CLIPMINI_CACHE"):
            keep(compute)
        assert len(compute.asked) == 1  # it shows how large a row is
        assert chunks_in(rows_folder) == []
        keep(compute, keys=KEYS[:2])
        with pytest.raises(ValueError, match="needs 320B"):
            keep(compute)
        assert len(compute.asked) == 3

    def test_only_what_is_missing_needs_room(self, free_bytes):
        interrupt_after(2)
        free_bytes(80)
        assert keep_all() == [8, 9]

    @pytest.mark.parametrize(
        ("number", "reason"),
        [
            (errno.ENOSPC, r"cannot write to .*\(No space left .* with room"),
            (errno.EROFS, r"cannot write to .*\(Read-only file system\)"),
        ],
    )
    def test_a_write_that_fails(self, failing_writes, number, reason):
        interrupt_after(1)
        failing_writes(number)
        with pytest.raises(ValueError, match=rf"numbers: .*{reason}.*") as caught:
            keep(Compute())
        assert "CLIPMINI_CACHE" in str(caught.value)

    def test_the_disk_fills_up_during_a_chunk(self, failing_writes):
        compute = Compute()

        def fill_the_disk(places):
            if len(compute.asked) == 1:
                failing_writes(errno.ENOSPC)
            return compute(places)

        with pytest.raises(ValueError, match=r"cannot write to .*No space left"):
            keep(fill_the_disk)

    def test_an_error_of_the_computation_is_not_the_cache(self):
        with pytest.raises(FileNotFoundError):
            keep(lambda places: Path("gone").read_bytes())

    def test_what_is_complete_needs_no_writing(self, rows_folder, failing_writes, monkeypatch):
        keep(Compute())
        failing_writes(errno.EROFS)
        monkeypatch.setattr(os, "utime", lambda path: Path(path).write_text(""))
        monkeypatch.setattr(store, "FileLock", None)
        assert keep_all() == []

    def test_a_folder_that_cannot_be_made(self, monkeypatch):
        monkeypatch.setenv("CLIPMINI_CACHE", __file__)
        with pytest.raises(ValueError, match=r"numbers: cannot write to .*CLIPMINI_CACHE"):
            keep(Compute())


def days_ago(days):
    return time.time() - days * store.DAY_S


class TestSpaces:
    def test_are_listed_and_removed(self, rows_folder):
        assert spaces() == clear() == []
        keep(Compute())
        keep(Compute(), keys=KEYS[:3], dtype="float16")
        for file in rows_folder.glob("*/space.json"):
            if "f4" in file.read_text():
                os.utime(file, (days_ago(40), days_ago(40)))
        first, second = spaces()
        assert (first.description, first.num_rows, round(first.days_unused)) == ("numbers", 3, 0)
        assert (second.num_rows, round(second.days_unused)) == (10, 40)
        assert second.num_bytes == sum(file.stat().st_size for file in second.folder.glob("*.safetensors"))
        assert [space.folder for space in spaces(older_than_days=30)] == [second.folder]
        assert clear(older_than_days=41) == []
        (removed,) = clear(older_than_days=30)
        assert removed.folder == second.folder
        assert [space.folder for space in spaces()] == [first.folder]
        clear()
        assert list(rows_folder.iterdir()) == []
        assert keep_all() == list(range(10))

    def test_reading_is_a_use(self, rows_folder):
        keep(Compute())
        (file,) = rows_folder.glob("*/space.json")
        os.utime(file, (days_ago(40), days_ago(40)))
        keep(Compute())
        assert spaces()[0].days_unused < 1

    def test_a_damaged_space_can_be_listed_and_removed(self, rows_folder):
        keep(Compute())
        (file,) = rows_folder.glob("*/space.json")
        file.write_text("{")
        assert spaces()[0].description.startswith("damaged")
        clear()
        assert spaces() == []


def test_a_space_in_use_is_not_cleared(tmp_path, caplog):
    keep_all()
    (space,) = spaces()
    with FileLock(space.folder / "lock-0"):
        assert clear() == []
    assert "in use, and kept" in caplog.text
    assert [cleared.folder for cleared in clear()] == [space.folder]
    assert not space.folder.exists()


def test_a_pipe_among_the_chunks_is_passed_over():
    keep_all()
    (space,) = spaces()
    os.mkfifo(space.folder / f"pipe{store.SUFFIX}")
    again = Compute()
    keep(again)
    assert spaces()[0].num_rows == 10


def test_a_space_that_lost_its_description_is_listed_and_cleared():
    keep_all()
    (space,) = spaces()
    (space.folder / store.SPACE_FILE).unlink()
    assert [found.folder for found in spaces()] == [space.folder]
    assert clear()
    assert spaces() == []
