"""Drawings of results."""

import itertools

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from clipmini.files import DRAWING_SUFFIXES, check_drawing
from clipmini.inference import drawing
from clipmini.inference.drawing import Example, Picture, draw_examples, draw_results
from clipmini.inference.search import Hit


def pixels(path):
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).astype(int)


def size_of(path):
    with Image.open(path) as image:
        return image.size


class TestDrawResults:
    def hits(self, folder, num_hits=5):
        paths = itertools.cycle([folder / "red.png", folder / "green.png", folder / "blue.png"])
        return [Hit(path, 0.5 - 0.1 * index) for index, path in zip(range(num_hits), paths, strict=False)]

    def test_images_keep_their_aspect_ratio(self, tmp_path):
        Image.new("RGB", (400, 100), (255, 0, 0)).save(tmp_path / "wide.png")
        Image.new("RGB", (100, 400), (0, 0, 255)).save(tmp_path / "high.png")
        draw_results({"a": [Hit(tmp_path / "wide.png", 1.0), Hit(tmp_path / "high.png", 0.5)]}, tmp_path / "out.png")
        drawn = pixels(tmp_path / "out.png")
        is_red, is_blue = (drawn == [255, 0, 0]).all(axis=2), (drawn == [0, 0, 255]).all(axis=2)
        for found, ratio in ((is_red, 4.0), (is_blue, 0.25)):
            rows, columns = np.nonzero(found)
            height, width = np.ptp(rows) + 1, np.ptp(columns) + 1
            assert found.sum() == height * width
            assert width / height == pytest.approx(ratio, rel=0.05)
        assert np.nonzero(is_red)[1].max() < np.nonzero(is_blue)[1].min()  # best first

    @pytest.mark.parametrize(
        ("nums_hits", "columns", "rows"),
        [([9], 3, 3), ([5], 3, 2), ([2], 2, 1), ([4, 2], 4, 2), ([1], 1, 1)],
    )
    def test_grid_for_one_query_and_rows_for_several(self, folder, tmp_path, nums_hits, columns, rows):
        query_hits = {str(index): [Hit(folder / "red.png", 1.0)] * num for index, num in enumerate(nums_hits)}
        draw_results(query_hits, tmp_path / "out.png")
        is_red = (pixels(tmp_path / "out.png") == [255, 0, 0]).all(axis=2)
        for axis, expected in ((0, columns), (1, rows)):
            runs = np.diff(is_red.any(axis=axis).astype(int))
            assert (runs == 1).sum() == (runs == -1).sum() == expected

    def test_unusual_characters(self, tmp_path, recwarn):
        odd = tmp_path / "日本 🐟 $x_1^ \\frac{.png"
        undecodable = tmp_path / b"bad\xff.png".decode("utf-8", "surrogateescape")
        for path in (odd, undecodable):
            Image.new("RGB", (1, 1)).save(path)
        hits = [Hit(odd, 0.1), Hit(undecodable, -0.1)]
        queries = [
            "$x_{$ for $5",
            "日本の寺 🐟 कुत्ता \u202e",
            "w" * 500,
            "one\ntwo\tthree \x00",
            "\udcff",
            "word " * 2000,
        ]
        draw_results({query: hits for query in queries}, tmp_path / "out.png")
        assert size_of(tmp_path / "out.png")[1] > 1000
        assert not [str(warning.message) for warning in recwarn if "lyph" in str(warning.message)]

    def test_wide_titles_stay_on_the_page(self, folder, tmp_path):
        draw_results({"W" * 300: self.hits(folder, 2)}, tmp_path / "out.png")
        drawn = pixels(tmp_path / "out.png")
        assert (drawn[:, -20:] == 255).all()
        assert (drawn[:60] < 100).any()

    @pytest.mark.parametrize("suffix", DRAWING_SUFFIXES)
    def test_every_suffix_is_written(self, folder, tmp_path, suffix):
        out = tmp_path / "new" / "folders" / f"out{suffix.upper()}"
        draw_results({"a": self.hits(folder, 1)}, out)
        assert [path.name for path in out.parent.iterdir()] == [out.name]
        if suffix == ".pdf":
            assert out.read_bytes().startswith(b"%PDF")
        else:
            assert size_of(out)[0] > 500

    @pytest.mark.parametrize("name", ["out.gif", "out", "out.png.txt"])
    def test_other_suffixes_are_refused(self, folder, tmp_path, name):
        with pytest.raises(ValueError, match=r"end its name in \.png"):
            draw_results({"a": self.hits(folder)}, tmp_path / name)
        assert not (tmp_path / name).exists()

    def test_a_folder_is_not_replaced(self, folder, tmp_path):
        (tmp_path / "out.png").mkdir()
        with pytest.raises(ValueError, match="is a folder"):
            draw_results({"a": self.hits(folder)}, tmp_path / "out.png")

    def test_an_image_that_is_gone_leaves_its_cell_empty(self, folder, tmp_path, caplog):
        out = tmp_path / "out.png"
        draw_results({"a": [Hit(folder / "gone.png", 1.0), Hit(folder / "red.png", 0.5)]}, out)
        assert "gone.png does not exist, and is not drawn" in caplog.text
        with Image.open(out) as image:
            colors = dict(map(reversed, image.convert("RGB").getcolors(2**20)))
        assert {(243, 243, 243), (255, 0, 0)} <= set(colors)

    def test_a_failure_keeps_the_old_file(self, folder, tmp_path, monkeypatch):
        out = tmp_path / "out.png"
        out.write_text("old")
        monkeypatch.setattr(Figure, "savefig", lambda *args, **options: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            draw_results({"a": self.hits(folder)}, out)
        assert out.read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.png"]

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(ValueError, match="no results"):
            draw_results({}, tmp_path / "out.png")

    def test_a_huge_page_gets_a_lower_resolution(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(drawing, "MAX_EDGE_DOTS", 600)
        draw_results({"a": self.hits(folder, 9)}, tmp_path / "out.png")
        assert max(size_of(tmp_path / "out.png")) <= 600

    def test_no_more_than_the_maximum_is_drawn(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(drawing, "MAX_DRAWN", 4)
        draw_results({"a": self.hits(folder, 4)}, tmp_path / "four.png")
        draw_results({"a": self.hits(folder, 9)}, tmp_path / "nine.png")
        assert (pixels(tmp_path / "four.png") == pixels(tmp_path / "nine.png")).all()

    def test_one_warning_for_hits_that_are_not_drawn(self, folder, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(drawing, "MAX_DRAWN", 2)
        draw_results({"a": self.hits(folder, 2)}, tmp_path / "out.png")
        assert not caplog.messages
        draw_results(
            {"a": self.hits(folder, 2), "b": self.hits(folder, 5), "c": self.hits(folder, 3)}, tmp_path / "x.png"
        )
        assert caplog.messages == ["only the best 2 of 5 images are drawn"]


def test_any_case_of_a_suffix_is_accepted():
    check_drawing("x.PNG")


def test_examples_stand_side_by_side_and_the_correct_image_is_framed(folder, tmp_path):
    red, blue = (
        Picture(folder / "red.png", "red.png", "1."),
        Picture(folder / "blue.png", "blue.png", "✓ 2.", "", True),
    )
    groups = {"Right": [Example("a", [red]), Example("b", [red])], "Wrong": [Example("a much longer " * 9, [blue])]}
    draw_examples({**groups, "None": []}, 2, tmp_path / "out.png")
    drawn = pixels(tmp_path / "out.png")
    is_red, is_blue, is_frame = ((drawn == color).all(axis=2) for color in ([255, 0, 0], [0, 0, 255], [5, 150, 105]))
    assert np.nonzero(is_red)[1].max() < np.nonzero(is_frame)[1].min() < np.nonzero(is_blue)[1].min()
    top = np.nonzero(is_red.any(axis=1))[0].min()
    assert abs(top - np.nonzero(is_blue.any(axis=1))[0].min()) < 30  # in one row, however long the titles
    with pytest.raises(ValueError, match="no results"):
        draw_examples({"None": []}, 2, tmp_path / "out.png")
