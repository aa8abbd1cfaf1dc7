"""Archives are unpacked once, whole or not at all, and never outside their folder."""

import io
import os
import tarfile
import zipfile

import pytest

from clipmini.data import archives
from clipmini.data.archives import unpack
from clipmini.store import clear, spaces, unpacked_folder


def make_tar(path, *members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if isinstance(content, bytes):
                member.size = len(content)
            else:
                member.type, member.linkname = content
            tar.addfile(member, io.BytesIO(content if isinstance(content, bytes) else b""))
    return path


def make_zip(path, *members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return path


class TestUnpack:
    def test_once(self, tmp_path):
        archive = make_zip(tmp_path / "a.zip", ("x/a.txt", "a"), ("b.txt", "b"))
        folder = unpack(archive)
        assert {str(path.relative_to(folder)) for path in folder.rglob("*.txt")} == {"x/a.txt", "b.txt"}
        (folder / "b.txt").write_text("kept")
        assert unpack(archive) == folder
        assert (folder / "b.txt").read_text() == "kept"
        make_zip(archive, ("b.txt", "changed"))
        os.utime(archive, (1, 1))
        assert (unpack(archive) / "b.txt").read_text() == "changed"

    @pytest.mark.parametrize("name", ["../a.txt", "x/../../a.txt", "/tmp/a.txt", "..\\a.txt", "C:\\a.txt"])
    @pytest.mark.parametrize("make", [make_tar, make_zip])
    def test_names_outside_the_folder(self, make, name, tmp_path):
        archive = make(tmp_path / f"a.{make.__name__[-3:]}", ("fine.txt", b"x"), (name, b"x"))
        with pytest.raises(ValueError, match="a name outside its folder"):
            unpack(archive)
        assert not list(unpacked_folder().glob("*/"))

    @pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
    def test_links(self, kind, tmp_path):
        archive = make_tar(tmp_path / "a.tar", ("link", (kind, "/etc/passwd")), ("link/x", b"x"))
        with pytest.raises(ValueError, match="holds a link, 'link'"):
            unpack(archive)

    def test_a_bomb(self, tmp_path, monkeypatch):
        monkeypatch.setattr(archives, "MIN_LIMIT_BYTES", 2**20)
        archive = make_zip(tmp_path / "a.zip", ("a.txt", bytes(2**25)))
        with pytest.raises(ValueError, match="grows beyond"):
            unpack(archive)
        assert not list(unpacked_folder().glob("*/"))

    @pytest.mark.parametrize(
        ("name", "content"), [("a.zip", b"no zip"), ("a.tar", b"no tar"), ("a.tar.gz", b"\x1f\x8b"), ("b.zip", b"PK")]
    )
    def test_damaged(self, name, content, tmp_path):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="cannot be unpacked"):
            unpack(tmp_path / name)

    def test_a_run_that_is_killed_leaves_nothing_that_is_used(self, tmp_path, monkeypatch):
        archive = make_zip(tmp_path / "a.zip", ("a.txt", "a"), ("b.txt", "b"))
        folder = unpack(archive).parent
        leftover = folder.with_name(".clipmini-tmp-123") / "new"  # as a killed process leaves it
        leftover.parent.mkdir()
        folder.rename(leftover)
        (leftover / "files/a.txt").unlink()
        assert not spaces()  # it may be another process's, which lives
        assert {path.name for path in unpack(archive).iterdir()} == {"a.txt", "b.txt"}
        assert not leftover.parent.exists()

    def test_is_listed_and_cleared_with_the_cache(self, tmp_path):
        unpack(make_zip(tmp_path / "photos.zip", ("a.txt", "12345"), ("b.txt", "1")))
        (space,) = spaces()
        assert (space.description, space.num_rows, space.num_bytes) == ("files of photos.zip", 2, 6)
        clear()
        assert not spaces()
