import io
import json
import os
import signal
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

import clipmini

pytest.importorskip("lancedb")
ray = pytest.importorskip("ray")

from clipmini.indexing import ray_engine  # noqa: E402


def make_images(folder, num_images):
    folder.mkdir(exist_ok=True)
    for number in range(num_images):
        Image.new("RGB", (40, 30), (number % 256, number // 256, 90)).save(folder / f"{number:05}.png")
    return folder


def png(number):
    stream = io.BytesIO()
    Image.new("RGB", (40, 30), (number, 0, 90)).save(stream, "PNG")
    return stream.getvalue()


def workers_below(pid):
    """Process ids of Ray's actors that descend from a process."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(folder.name)] = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            names[int(folder.name)] = (folder / "cmdline").read_text()
        except OSError:
            continue

    def descends(process):
        return process == pid or (process in parents and descends(parents[process]))

    return [process for process, name in names.items() if "Embedder" in name and descends(process)]


@pytest.fixture(scope="module")
def two_workers():
    ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    yield
    ray.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="finds workers by /proc")
def test_a_killed_worker_leaves_each_image_once(two_workers, tiny_folder, tmp_path):
    images = make_images(tmp_path / "images", 4000)
    (images / "broken.png").write_bytes(b"no image")
    index = clipmini.open_index(tmp_path / "index", tiny_folder)
    killed = []

    def kill_one():
        reader = clipmini.open_index(tmp_path / "index")
        while not (len(reader) and len(workers_below(os.getpid())) == 2):
            time.sleep(0.05)
            reader.table.checkout_latest()
        killed.append(workers_below(os.getpid())[0])
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill_one, daemon=True)
    killer.start()
    changes = index.add(images, ray=True)
    assert killed
    keys = Counter(index.table.to_arrow()["key"].to_pylist())
    assert set(keys.values()) == {1}
    assert keys.keys() == {str(path) for path in images.glob("0*.png")}
    assert (changes.num_images, changes.num_embedded) == (4000, 4000)
    assert [Path(name).name for name, _ in changes.skipped.items] == ["broken.png"]

    (images / "00007.png").unlink()
    again = index.add(images, ray=True)
    assert (again.num_embedded, again.num_unchanged, again.num_dropped) == (0, 3999, 1)


@pytest.mark.slow
def test_rows_of_parquet_and_tar_files_get_the_keys_and_vectors_that_they_get_on_one_machine(
    two_workers, tiny_folder, tmp_path
):
    rows = [{"image": {"bytes": png(number), "path": None}, "caption": f"number {number}"} for number in range(20)]
    parquet = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist([*rows, {"image": {"bytes": b"no image", "path": None}}]), parquet)
    local = clipmini.open_index(tmp_path / "local", tiny_folder)
    local.add(parquet)
    index = clipmini.open_index(tmp_path / "index", tiny_folder)
    changes = index.add(parquet, ray=True)
    assert (changes.num_embedded, changes.num_images, changes.skipped.count) == (20, 20, 1)
    columns = ["key", "caption", "digest", "thumbnail"]
    expected = local.table.to_arrow().sort_by("key").select(columns)
    assert index.table.to_arrow().sort_by("key").select(columns) == expected

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        for number in range(100, 110):
            caption = json.dumps({"caption": f"number {number}"}).encode()
            for suffix, content in (("png", png(number)), ("json", caption)):
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    assert index.add(tmp_path / "shard.tar", ray=True).num_images == 30
    again = index.add(tmp_path / "shard.tar", parquet, ray=True)
    assert (again.num_embedded, again.num_unchanged) == (0, 30)
    by_pattern = clipmini.open_index(tmp_path / "pattern", tiny_folder)
    assert by_pattern.add(tmp_path / "sh*.tar", f"file://{tmp_path}/*.parquet", ray=True).num_images == 30
    assert "number 105" in index.to_datasets()["caption"]
    make_images(tmp_path / "images", 6)
    assert index.add(f"file://{tmp_path}/images", ray=True).num_embedded == 6
    assert index.add(f"file://{tmp_path}/images", ray=True).num_embedded == 0
    with pytest.raises(ValueError, match="has no images"):
        index.add(f"file://{tmp_path}/index", ray=True)
    with pytest.raises(ValueError, match=r"missing\.parquet cannot be read"):
        index.add(tmp_path / "missing.parquet", ray=True)


def test_rows_of_all_sources_are_made_images_with_captions():
    files = pa.table({"path": ["s3://bucket/a.jpg"], "bytes": [b"a"]})
    (entry,) = ray_engine._entries_of_addresses("s3://bucket", files)
    assert (entry.key, entry.source, entry.read_bytes(), entry.caption) == (
        "s3://bucket/a.jpg",
        "s3://bucket",
        b"a",
        None,
    )
    shard = pa.table({"__key__": ["a", "b"], "jpg": [b"a", None], "txt": [b"a dog", None], "json": [None, b"{}"]})
    one, two = ray_engine._entries_of_webdataset("x.tar", shard)
    assert (one.read_bytes(), one.caption) == (b"a", "a dog")
    assert (two.read_bytes(), two.caption) == (None, None)
    rows = pa.table({"photo": [b"a"], "text": [["a dog", "an animal"]]})
    (entry,) = ray_engine._entries_of_parquet("x.parquet", "photo", "text", rows)
    assert (entry.read_bytes(), entry.caption) == (b"a", "a dog\nan animal")


def test_the_extra_is_named_where_ray_is_not_installed(tiny_folder, tmp_path, monkeypatch):
    index = clipmini.open_index(tmp_path / "index", tiny_folder)
    monkeypatch.setitem(__import__("sys").modules, "clipmini.indexing.ray_engine", None)
    with pytest.raises(ValueError, match=r"pip install 'clipmini\[ray\]'"):
        index.add(tmp_path, ray=True)
