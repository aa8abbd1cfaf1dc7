"""Images are found in folders, and inputs that were left out are counted and named."""

import logging

import pytest

from clipmini.data.images import MAX_LOGGED, Skipped, find_images


class TestFindImages:
    def test_recursive_sorted_and_without_hidden(self, tmp_path):
        for name in ("b.JPG", "a.png", "sub/deep/c.webp", ".hidden.jpg", ".cache/d.jpg", "notes.txt", "e.jpg.part"):
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"")
        expected = [tmp_path / "a.png", tmp_path / "b.JPG", tmp_path / "sub/deep/c.webp"]
        assert find_images(tmp_path) == expected
        assert find_images(str(tmp_path)) == expected

    def test_hidden_parent_does_not_matter(self, tmp_path):
        folder = tmp_path / ".mine"
        folder.mkdir()
        (folder / "a.png").write_bytes(b"")
        assert find_images(folder) == [folder / "a.png"]

    @pytest.mark.parametrize(
        ("name", "reason"), [("gone", "does not exist"), ("a.txt", "not a folder"), ("empty", "has no images")]
    )
    def test_errors(self, name, reason, tmp_path):
        (tmp_path / "a.txt").write_text("a")
        (tmp_path / "empty").mkdir()
        with pytest.raises(ValueError, match=reason):
            find_images(tmp_path / name)

    def test_names_a_sub_folder_that_cannot_be_read(self, tmp_path, monkeypatch, caplog):
        error = PermissionError(13, "Permission denied", "a/b")
        monkeypatch.setattr("os.walk", lambda top, onerror, **_: onerror(error) or [(top, [], ["a.png"])])
        assert find_images(tmp_path) == [tmp_path / "a.png"]
        assert caplog.messages == ["cannot look into a/b (Permission denied)"]


class TestSkipped:
    def test_counts_and_warns(self, caplog):
        skipped = Skipped()
        assert skipped.count == 0
        skipped.add("a.jpg", "is empty")
        skipped.add("b.jpg", "does not exist")
        skipped.log_summary()
        assert skipped.count == 2
        assert skipped.items == [("a.jpg", "is empty"), ("b.jpg", "does not exist")]
        assert [record.getMessage() for record in caplog.records] == [
            "skipped 1 so far: a.jpg: is empty",
            "skipped 2 so far: b.jpg: does not exist",
            "2 inputs skipped",
        ]
        assert {record.levelno for record in caplog.records} == {logging.WARNING}

    def test_silent_when_all_is_well(self, caplog):
        Skipped().log_summary()
        assert not caplog.records

    def test_does_not_flood(self, caplog):
        skipped = Skipped()
        for number in range(MAX_LOGGED + 30):
            skipped.add(f"{number}.jpg", "is empty")
        skipped.log_summary()
        assert len(caplog.records) == MAX_LOGGED + 1
        assert caplog.messages[-1] == f"{MAX_LOGGED + 30} inputs skipped; the first {MAX_LOGGED} are named above"
        assert len(skipped.items) == MAX_LOGGED + 30

    def test_strict_stops_at_the_first(self):
        with pytest.raises(ValueError, match=r"a\.jpg: is empty"):
            Skipped(strict=True).add("a.jpg", "is empty")
