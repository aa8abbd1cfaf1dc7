import contextlib
import multiprocessing
import os
import platform
import re
import resource
import shutil
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import safetensors.torch
import torch
from filelock import FileLock, Timeout

from clipmini import files
from clipmini.files import TEMPORARY, atomic_write, remove_leftovers, run_of, sole_run, versions

fork = multiprocessing.get_context("fork")


def test_versions_are_those_that_are_installed(monkeypatch):
    found = versions()
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["python"] == platform.python_version()
    assert {"clipmini", "torchvision", "transformers", "timm", "datasets", "accelerate"} <= set(found)
    assert found["cpu_threads"] == str(torch.get_num_threads())
    assert all(isinstance(value, str) for value in found.values())
    assert not any(platform.node() in value for value in found.values() if platform.node())
    monkeypatch.setattr(files, "PACKAGES", ("torch", "surely-not-installed"))
    assert "surely-not-installed" not in versions()


def test_the_run_of_a_model_is_found_from_inside_its_folder(tmp_path, monkeypatch):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "recipe_as_run.yaml").touch()
    monkeypatch.chdir(tmp_path / "run" / "model")
    assert run_of(Path()) == run_of(Path("../model")).resolve() == tmp_path / "run"
    assert run_of(tmp_path / "run") is None


def kill_in(target, *arguments):
    """Run a function in a process of its own, which ends by SIGKILL."""
    child = fork.Process(target=target, args=arguments)
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL


def replace_and_die(target, moment):
    """Replace a folder, and be killed while it is written, or between the two renames, or when it is in place."""
    rename, replace = Path.rename, Path.replace

    def die(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    if moment == "between":
        Path.rename = lambda path, place: (rename(path, place), die())
    if moment == "after":
        Path.replace = lambda path, place: (replace(path, place), die())
    with atomic_write(target) as temporary:
        temporary.mkdir()
        (temporary / "a.txt").write_text("new")
        if moment == "while":
            die()


@pytest.mark.parametrize(("moment", "kept"), [("while", "old"), ("between", "old"), ("after", "new")])
def test_what_a_killed_process_was_replacing_is_whole_and_nothing_else_is_left(tmp_path, moment, kept):
    target = tmp_path / "model"
    target.mkdir()
    (target / "a.txt").write_text("old")
    kill_in(replace_and_die, target, moment)
    assert target.exists() == (moment != "between")
    remove_leftovers(tmp_path)
    assert (target / "a.txt").read_text() == kept
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_the_next_write_removes_what_killed_processes_left_and_nothing_of_those_that_live(tmp_path):
    kill_in(replace_and_die, tmp_path / "model", "while")
    with atomic_write(tmp_path / "a.txt") as one:
        with atomic_write(tmp_path / "b.txt") as other:
            other.write_text("b")
        one.write_text("a")
        assert len(list(tmp_path.glob(".*"))) == 1  # its own
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "b.txt"]


def test_an_error_while_a_folder_is_replaced_puts_it_back(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a.txt").write_text("old")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(PermissionError), atomic_write(tmp_path / "model") as temporary:
        temporary.mkdir()
    assert (tmp_path / "model" / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_file_does_not_replace_a_folder(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("a")
    with (
        pytest.raises(IsADirectoryError, match=f"{tmp_path}/photos'$"),
        atomic_write(tmp_path / "photos") as temporary,
    ):
        temporary.write_text("teacher")
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "a.jpg"]


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_to_a_folder_is_replaced_and_kept_by_a_kill(tmp_path, is_there):
    target = tmp_path / "run" / "model"
    target.parent.mkdir()
    target.symlink_to(tmp_path / "elsewhere")
    if is_there:
        (tmp_path / "elsewhere").mkdir()
    kill_in(replace_and_die, target, "between")
    remove_leftovers(target.parent)
    assert target.is_symlink()
    with atomic_write(target) as temporary:
        temporary.mkdir()
    assert not target.is_symlink()
    assert (tmp_path / "elsewhere").exists() == is_there


def test_a_folder_is_not_removed_by_a_process_that_found_it_unlocked(tmp_path, monkeypatch):
    """Between the test of a lock and the removal, the folder's maker may lock it."""
    temporary, rmtree = tmp_path / f"{TEMPORARY}a", shutil.rmtree
    temporary.mkdir()  # and not locked yet
    held = []

    def lock_and_remove(folder):
        with contextlib.suppress(Timeout):
            held.append(FileLock(folder / "lock", timeout=0).acquire())
        rmtree(folder)

    monkeypatch.setattr(shutil, "rmtree", lock_and_remove)
    remove_leftovers(tmp_path)
    assert not held


def test_many_threads_write_into_one_folder_at_once(tmp_path):
    def write(name):
        for number in range(40):
            with atomic_write(tmp_path / name) as temporary:
                temporary.mkdir()
                (temporary / "number").write_text(str(number))
            assert (tmp_path / name / "number").read_text() == str(number)

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, "abcd"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [*"abcd"]


@pytest.mark.skipif(sys.platform != "linux", reason="a place where no folder can be made")
def test_a_folder_that_cannot_be_made_is_an_error_and_no_endless_loop():
    with pytest.raises(ValueError, match="/proc/run cannot be written to"), sole_run(Path("/proc/run")):
        pass


def write_too_much(how, folder):
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    try:
        with atomic_write(folder / "file") as temporary:
            if how == "python":
                temporary.write_bytes(bytes(200_000))
            elif how == "safetensors":
                safetensors.torch.save_file({"a": torch.zeros(50_000)}, temporary)
            else:
                torch.save({"a": torch.zeros(50_000)}, temporary)
    except OSError as error:
        (folder / "error").write_text(str(error))


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on the size of files")
@pytest.mark.parametrize("how", ["python", "safetensors", "torch"])
def test_a_full_disk_is_one_error_whoever_writes(tmp_path, how):
    (tmp_path / "file").write_text("old")
    child = fork.Process(target=write_too_much, args=(how, tmp_path))
    child.start()
    child.join(60)
    error = (tmp_path / "error").read_text()
    assert re.fullmatch(
        r"\[Errno \d+\] (File too large|No space left on device); what was there before is kept, so make room and run "
        rf"the same command again: '{tmp_path}/file'",
        error,
    )
    assert (tmp_path / "file").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_second_run_into_a_folder_is_refused_and_told_of_the_first(tmp_path):
    with sole_run(tmp_path / "run"):
        with (
            pytest.raises(ValueError, match=rf"run \(process {os.getpid()} on .+, since 20\d\d-.+\): wait for"),
            sole_run(tmp_path / "run"),
        ):
            pass
        remove_leftovers(tmp_path / "run")
        (tmp_path / "run" / "a.txt").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["a.txt"]
    with sole_run(tmp_path / "run"):
        pass


def run_and_die(folder):
    with sole_run(folder):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_keeps_no_other_out(tmp_path):
    kill_in(run_and_die, tmp_path / "run")
    with sole_run(tmp_path / "run"):
        pass
    assert not list((tmp_path / "run").iterdir())


def test_a_run_into_a_file_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(ValueError, match=rf"{folder} cannot be written to \(Not a directory\)"), sole_run(folder):
            pass
