"""Ranking of hand-made embeddings, folders with broken images, and drawings of results."""

import itertools
import logging

import numpy as np
import pytest
import torch
from PIL import Image

from clipmini.data.images import Skipped
from clipmini.inference import encode, search
from clipmini.inference.encode import encode_images, encode_texts
from clipmini.inference.search import Hit, check_search, draw_results, embed_folder, rank, search_folder

COLORS = ["red", "green", "blue", "white", "black"]


@pytest.fixture
def folder(tmp_path):
    """Five plain images of different shapes, one of them in a subfolder."""
    root = tmp_path / "images"
    (root / "more").mkdir(parents=True)
    for index, color in enumerate(COLORS):
        parent = root / "more" if color == "white" else root
        Image.new("RGB", (30 + 20 * index, 60), color).save(parent / f"{color}.png")
    return root


class TestRank:
    def test_order_and_scores(self):
        embeddings = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
        hits = rank(["a", "b", "c"], embeddings, torch.tensor([1.0, 0.0]), top=3)
        assert [(hit.path, round(hit.score, 6)) for hit in hits] == [("b", 1.0), ("c", 0.6), ("a", 0.0)]

    def test_top_limits_the_hits(self):
        embeddings = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
        assert [hit.path for hit in rank(["a", "b", "c"], embeddings, torch.tensor([1.0, 0.0]), top=2)] == ["b", "c"]

    def test_top_above_the_number_of_images(self):
        assert len(rank(["a", "b"], torch.eye(2), torch.tensor([1.0, 0.0]), top=9)) == 2

    def test_ties_keep_the_order_of_paths(self):
        names = [f"{index:03d}" for index in range(200)]
        embeddings = torch.tensor([[1.0, 0.0]] * 150 + [[0.0, 1.0]] * 50)
        hits = rank(names, embeddings, torch.tensor([0.0, 1.0]), top=200)
        assert [hit.path for hit in hits] == names[150:] + names[:150]

    def test_scores_that_are_not_finite(self):
        with pytest.raises(ValueError, match="are NaN"):
            rank(["a"], torch.tensor([[float("nan"), 0.0]]), torch.tensor([1.0, 0.0]))

    @pytest.mark.parametrize("top", [0, -1])
    def test_top_below_one(self, top):
        with pytest.raises(ValueError, match=f"top={top} "):
            rank(["a"], torch.eye(1), torch.ones(1), top)


class TestSearchFolder:
    def test_equals_a_matrix_product(self, tiny_model, tiny_processor, folder):
        paths = [*sorted(folder.glob("*.png")), folder / "more" / "white.png"]
        scores = encode_images(tiny_model, tiny_processor, paths) @ encode_texts(tiny_model, tiny_processor, ["a"])[0]
        expected = sorted(zip(scores.tolist(), paths, strict=True), key=lambda item: -item[0])[:3]
        hits = search_folder(tiny_model, tiny_processor, folder, "a", top=3)
        assert [hit.path for hit in hits] == [path for _, path in expected]
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in expected], abs=1e-6)
        assert -1 <= hits[-1].score <= hits[0].score <= 1

    def test_broken_images_are_left_out_and_listed(self, tiny_model, tiny_processor, folder):
        (folder / "a.jpg").write_bytes(b"no image")
        (folder / "empty.png").write_bytes(b"")
        skipped = Skipped()
        paths, embeds = embed_folder(tiny_model, tiny_processor, folder, skipped)
        assert [path.name for path in paths] == ["black.png", "blue.png", "green.png", "white.png", "red.png"]
        assert embeds.shape == (5, 16)
        assert [name.rsplit("/", 1)[-1] for name, _ in skipped.items] == ["a.jpg", "empty.png"]
        # Row i is still the embedding of path i.
        for path, embed in zip(paths, embeds, strict=True):
            torch.testing.assert_close(encode_images(tiny_model, tiny_processor, [path])[0], embed)

    def test_a_summary_is_logged_without_skipped(self, tiny_model, tiny_processor, folder, caplog):
        (folder / "a.jpg").write_bytes(b"no image")
        with caplog.at_level(logging.WARNING):
            search_folder(tiny_model, tiny_processor, folder, "a")
        assert caplog.messages[-1] == "1 input skipped"

    def test_strict_raises(self, tiny_model, tiny_processor, folder):
        (folder / "bad.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"bad\.jpg"):
            search_folder(tiny_model, tiny_processor, folder, "a", skipped=Skipped(strict=True))

    def test_only_broken_images(self, tiny_model, tiny_processor, tmp_path):
        (tmp_path / "bad.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"No image can be read: .*bad\.jpg is not an image"):
            search_folder(tiny_model, tiny_processor, tmp_path, "a")

    @pytest.mark.parametrize(
        ("query", "top", "message"),
        [(" \n", 9, "query is empty"), ("a", 0, "top=0 "), ("a \udcff fish", 9, "not text in UTF-8")],
    )
    def test_bad_arguments(self, tiny_model, tiny_processor, tmp_path, query, top, message):
        with pytest.raises(ValueError, match=message):
            search_folder(tiny_model, tiny_processor, tmp_path / "missing", query, top)

    def test_at_most_one_batch_is_read_ahead(self, tiny_model, tiny_processor, folder, monkeypatch):
        num_read, num_embedded, ahead = itertools.count(1), 0, []
        read, embed = encode.read_image, tiny_model.get_image_features

        def counting_read(source):
            if not isinstance(source, Image.Image):
                ahead.append(next(num_read) - num_embedded)
            return read(source)

        def counting_embed(pixel_values):
            nonlocal num_embedded
            num_embedded += len(pixel_values)
            return embed(pixel_values)

        monkeypatch.setattr(encode, "read_image", counting_read)
        monkeypatch.setattr(tiny_model, "get_image_features", counting_embed)
        embed_folder(tiny_model, tiny_processor, folder, batch_size=2)
        assert ahead == [1, 2, 1, 2, 1]

    def test_large_images_are_prepared_a_few_at_a_time(self, tiny_model, tiny_processor, folder, monkeypatch):
        expected = embed_folder(tiny_model, tiny_processor, folder)[1]
        sizes = []
        prepare = type(tiny_processor).__call__

        def counting_prepare(self, images=None, **options):
            sizes.append(len(images))
            return prepare(self, images=images, **options)

        monkeypatch.setattr(type(tiny_processor), "__call__", counting_prepare)
        monkeypatch.setattr(encode, "MAX_WAITING_PIXELS", 110 * 60)
        torch.testing.assert_close(embed_folder(tiny_model, tiny_processor, folder)[1], expected)
        # black is 110 wide and blue 70, green 50 and white 90, red 30
        assert sizes == [2, 2, 1]


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
        ("nums_hits", "given", "columns", "rows"),
        [
            ([9], None, 3, 3),
            ([5], None, 3, 2),
            ([2], None, 2, 1),
            ([9], 5, 5, 2),
            ([4, 2], None, 4, 2),
            ([1], 7, 1, 1),
        ],
    )
    def test_grid_for_one_query_and_rows_for_several(self, folder, tmp_path, nums_hits, given, columns, rows):
        query_hits = {str(index): [Hit(folder / "red.png", 1.0)] * num for index, num in enumerate(nums_hits)}
        draw_results(query_hits, tmp_path / "out.png", given)
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

    @pytest.mark.parametrize("suffix", search.DRAWING_SUFFIXES)
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

    def test_a_failure_keeps_the_old_file(self, folder, tmp_path):
        out = tmp_path / "out.png"
        out.write_text("old")
        with pytest.raises(ValueError, match=r"gone\.png does not exist"):
            draw_results({"a": [Hit(folder / "gone.png", 1.0)]}, out)
        assert out.read_text() == "old"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "out.png"]

    def test_nothing_to_draw(self, tmp_path):
        with pytest.raises(ValueError, match="no results"):
            draw_results({}, tmp_path / "out.png")

    def test_a_huge_page_gets_a_lower_resolution(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(search, "MAX_EDGE_DOTS", 600)
        draw_results({"a": self.hits(folder, 9)}, tmp_path / "out.png")
        assert max(size_of(tmp_path / "out.png")) <= 600

    def test_no_more_than_the_maximum_is_drawn(self, folder, tmp_path, monkeypatch):
        monkeypatch.setattr(search, "MAX_DRAWN", 4)
        draw_results({"a": self.hits(folder, 4)}, tmp_path / "four.png")
        draw_results({"a": self.hits(folder, 9)}, tmp_path / "nine.png")
        assert (pixels(tmp_path / "four.png") == pixels(tmp_path / "nine.png")).all()

    def test_one_warning_for_hits_that_are_not_drawn(self, folder, tmp_path, monkeypatch, caplog):
        monkeypatch.setattr(search, "MAX_DRAWN", 2)
        draw_results({"a": self.hits(folder, 2)}, tmp_path / "out.png")
        assert not caplog.messages
        draw_results(
            {"a": self.hits(folder, 2), "b": self.hits(folder, 5), "c": self.hits(folder, 3)}, tmp_path / "x.png"
        )
        assert caplog.messages == ["only the best 2 of 5 images are drawn"]


def test_check_search_accepts_good_arguments():
    check_search("a fish", 1, "x.PNG")
