"""Ranking of hand-made embeddings, folders with broken images, and drawings of results."""

import itertools
import json
import logging
import re

import pytest
import torch
from PIL import Image

import clipmini
from clipmini.data.images import Skipped, find_images
from clipmini.inference import embed as embed_module
from clipmini.inference.embed import DualEncoder
from clipmini.inference.search import Hit, Hits, rank


class TestRank:
    def test_order_and_scores(self):
        embeddings = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
        hits = rank(["a", "b", "c"], embeddings, torch.tensor([1.0, 0.0]), top=3)
        assert [(hit.image, round(hit.score, 6)) for hit in hits] == [("b", 1.0), ("c", 0.6), ("a", 0.0)]

    def test_top_limits_the_hits(self):
        embeddings = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.6, 0.8]])
        assert [hit.image for hit in rank(["a", "b", "c"], embeddings, torch.tensor([1.0, 0.0]), top=2)] == ["b", "c"]

    def test_top_above_the_number_of_images(self):
        assert len(rank(["a", "b"], torch.eye(2), torch.tensor([1.0, 0.0]), top=9)) == 2

    def test_ties_keep_the_order_of_paths(self):
        names = [f"{index:03d}" for index in range(200)]
        embeddings = torch.tensor([[1.0, 0.0]] * 150 + [[0.0, 1.0]] * 50)
        hits = rank(names, embeddings, torch.tensor([0.0, 1.0]), top=200)
        assert [hit.image for hit in hits] == names[150:] + names[:150]

    def test_priors_are_subtracted(self):
        embeddings, priors = torch.tensor([[1.0, 0.0], [0.8, 0.6]]), torch.tensor([0.5, 0.1])
        hits = rank(["hub", "other"], embeddings, torch.tensor([1.0, 0.0]), top=2, priors=priors)
        assert [(hit.image, round(hit.score, 6)) for hit in hits] == [("other", 0.7), ("hub", 0.5)]

    def test_of_near_copies_the_best_alone(self):
        """At 11 degrees the cosine is above 0.98, at 12 below; a copy of one that is left out is none."""
        degrees = {"best": 0, "copy": 11, "copy of the copy": 22, "second": 39, "copy of the second": 50, "third": 62}
        angles = torch.tensor(list(degrees.values())).deg2rad()
        embeddings, query = torch.stack([angles.cos(), angles.sin()], dim=1), torch.tensor([1.0, 0.0])
        kept = ["best", "copy of the copy", "second", "third"]
        assert [hit.image for hit in rank(list(degrees), embeddings, query, top=9, collapse=True)] == kept
        assert [hit.image for hit in rank(list(degrees), embeddings, query, top=3, collapse=True)] == kept[:3]
        assert len(rank(list(degrees), embeddings, query, top=9)) == 6

    def test_scores_that_are_not_finite(self):
        with pytest.raises(ValueError, match="are NaN"):
            rank(["a"], torch.tensor([[float("nan"), 0.0]]), torch.tensor([1.0, 0.0]))


class TestSearch:
    def test_equals_a_matrix_product(self, tiny_model, folder):
        paths = [*sorted(folder.glob("*.png")), folder / "more" / "white.png"]
        scores = DualEncoder(tiny_model).encode_images(paths) @ DualEncoder(tiny_model).encode_texts(["a"])[0]
        expected = sorted(zip(scores.tolist(), paths, strict=True), key=lambda item: -item[0])[:3]
        hits = clipmini.search(tiny_model, folder, "a", top=3)
        assert [hit.image for hit in hits] == [path for _, path in expected]
        assert [hit.score for hit in hits] == pytest.approx([score for score, _ in expected], abs=1e-6)
        assert -1 <= hits[-1].score <= hits[0].score <= 1

    def test_broken_images_are_left_out_and_listed(self, tiny_model, folder):
        (folder / "a.jpg").write_bytes(b"no image")
        (folder / "empty.png").write_bytes(b"")
        skipped = Skipped()
        paths, embeds = DualEncoder(tiny_model).encode_files(find_images(folder), skipped)
        assert [path.name for path in paths] == ["black.png", "blue.png", "green.png", "white.png", "red.png"]
        assert embeds.shape == (5, 16)
        assert [name.rsplit("/", 1)[-1] for name, _ in skipped.items] == ["a.jpg", "empty.png"]
        # Row i is still the embedding of path i.
        for path, embed in zip(paths, embeds, strict=True):
            torch.testing.assert_close(DualEncoder(tiny_model).encode_images([path])[0], embed)

    def test_a_summary_is_logged(self, tiny_model, folder, caplog):
        (folder / "a.jpg").write_bytes(b"no image")
        with caplog.at_level(logging.WARNING):
            clipmini.search(tiny_model, folder, "a")
        assert caplog.messages[-1] == "1 input skipped"

    def test_strict_raises(self, tiny_model, folder):
        (folder / "bad.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"bad\.jpg"):
            clipmini.search(tiny_model, folder, "a", strict=True)

    def test_only_broken_images(self, tiny_model, tmp_path):
        (tmp_path / "bad.jpg").write_bytes(b"no image")
        with pytest.raises(ValueError, match=r"No image can be read: .*bad\.jpg is not an image"):
            clipmini.search(tiny_model, tmp_path, "a")

    @pytest.mark.parametrize(
        ("query", "top", "message"),
        [(" \n", 9, "query is empty"), ("a", 0, "top=0 "), ("a \udcff fish", 9, "not text in UTF-8")],
    )
    def test_bad_arguments(self, tiny_model, tmp_path, query, top, message):
        with pytest.raises(ValueError, match=message):
            clipmini.search(tiny_model, tmp_path / "missing", query, top)

    def test_only_a_few_images_are_read_ahead(self, tiny_model, folder, monkeypatch):
        num_read, num_embedded, ahead = itertools.count(1), 0, []
        read, embed = embed_module.read_image, tiny_model.get_image_features

        def counting_read(source, **options):
            if not isinstance(source, Image.Image):
                ahead.append(next(num_read) - num_embedded)
            return read(source, **options)

        def counting_embed(pixel_values, **options):
            nonlocal num_embedded
            num_embedded += len(pixel_values)
            return embed(pixel_values, **options)

        monkeypatch.setattr(embed_module, "read_image", counting_read)
        monkeypatch.setattr(tiny_model, "get_image_features", counting_embed)
        monkeypatch.setattr(embed_module, "NUM_AHEAD", 2)
        DualEncoder(tiny_model).encode_files(find_images(folder) * 4, batch_size=2)
        assert len(ahead) == 20
        assert max(ahead) <= 2 + 2 + 1  # of the batch, ahead of it, and one that was taken just now


class TestHits:
    def test_pillow_images_and_files_are_found_together(self, tiny_model, folder):
        red = Image.new("RGB", (30, 60), "red")
        hits = clipmini.search(tiny_model, [folder / "green.png", red, str(folder / "red.png")], "a", top=2)
        assert isinstance(hits, Hits)
        assert red in [hit.image for hit in clipmini.search(tiny_model, [red, folder / "green.png"], "a")]
        assert len(hits) == 2

    def test_they_are_ready_for_json_and_short_to_read(self, folder):
        skipped = Skipped()
        skipped.add("bad.png", "is empty")
        hits = Hits("a fish", [Hit(folder / "red.png", 0.25), Hit(Image.new("RGB", (4, 4)), 0.125)], skipped)
        assert json.loads(json.dumps(hits.to_dict())) == {
            "query": "a fish",
            "scoring": "cosine",
            "hits": [{"path": str(folder / "red.png"), "score": 0.25}, {"path": None, "score": 0.125}],
            "num_skipped": 1,
            "skipped": [{"path": "bad.png", "reason": "is empty"}],
        }
        assert repr(hits) == "<hits for 'a fish': red.png (0.250) and 1 more>"

    def test_a_notebook_shows_them_escaped_even_if_images_are_gone(self, folder):
        (folder / "red.png").rename(folder / "<b>.png")
        hits = [Hit(folder / "<b>.png", 0.25), Hit(folder / "gone.png", 0.125), Hit(Image.new("RGB", (4, 4)), 0.0)]
        html = Hits("<script>", hits)._repr_html_()
        assert "&lt;script&gt;" in html
        assert html.count("&lt;b&gt;.png") == 3
        assert not {"<script>", "<b>.png"} & set(re.findall("<[^ ]*", html))
        assert (html.count("data:image/jpeg;base64,"), html.count("gone or broken")) == (2, 1)

    def test_a_notebook_shows_only_the_first(self, folder):
        html = Hits("a", [Hit(folder / "red.png", 0.5)] * 40)._repr_html_()
        assert (html.count("<img"), "and 10 more" in html) == (30, True)
