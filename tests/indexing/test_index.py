"""What an index answers, and which questions, models and files it refuses."""

import importlib.util
import json
import resource
import shutil
import sys
from pathlib import Path

import lancedb
import pytest
import torch
from filelock import FileLock
from PIL import Image
from typer.testing import CliRunner

import clipmini
from clipmini import cli, store
from clipmini.indexing import find
from clipmini.indexing.index import LOCK_FILE, Index
from clipmini.inference.bank import Bank, save_bank
from clipmini.inference.encoders import load_encoder
from clipmini.names import is_index
from modeling_clipmini import ClipMiniModel
from pair_files import write_images


@pytest.fixture
def photos(tmp_path):
    return write_images(tmp_path / "photos", 6)


@pytest.fixture
def index(tmp_path, tiny_folder, photos):
    index = clipmini.open_index(tmp_path / "photos.index", tiny_folder)
    index.add(photos)
    return index


def names(hits):
    return [hit.name for hit in hits]


class TestSearch:
    def test_hits_are_those_of_a_look_at_every_image(self, index, photos, tiny_folder):
        query = "a red bicycle"
        (found,) = index.search(query, top=4)
        expected = clipmini.search(tiny_folder, photos, query, top=4, use_index=False)
        assert names(found) == names(expected)
        assert [hit.score for hit in found] == pytest.approx([hit.score for hit in expected], abs=1e-3)
        assert found.scoring == expected.scoring == "cosine"

    def test_several_queries_with_terms(self, index, photos):
        encoder = index.encoder
        with Image.open(photos / "3.png") as image:
            image.load()
        found = index.search("a", image, f"image:{photos / '1.png'}", plus=["b"], minus=["c"], top=6)
        assert [hits.query for hits in found] == ["a + b - c", "3.png + b - c", f"image:{photos / '1.png'} + b - c"]
        a, b, c = encoder.encode_texts(["a", "b", "c"])
        expected = torch.nn.functional.normalize(a + b - c, dim=0)
        images = encoder.encode_images(sorted(photos.iterdir()))
        scores = {f"{row}.png": score for row, score in enumerate((images @ expected).tolist())}
        assert {hit.name: hit.score for hit in found[0]} == pytest.approx(scores, abs=2e-3)

    def test_an_image_of_the_index_is_not_embedded_again(self, index, photos, monkeypatch):
        monkeypatch.setattr(ClipMiniModel, "embed_pixels", None)
        monkeypatch.chdir(photos)
        for name in (photos / "2.png", "2.png"):
            assert names(index.search(f"image:{name}", top=1)[0]) == ["2.png"]

    def test_conditions(self, index):
        assert len(index.search("a", where="width > 3 and caption is null")[0]) == 6
        (none,) = index.search("a", where="width > 4")
        assert (len(none), repr(none)) == (0, "<no hits for 'a'>")

    @pytest.mark.parametrize("condition", ["", "widht > 3", "width >", "width > 'x'", "drop table images", "key"])
    def test_what_is_no_condition(self, index, condition):
        with pytest.raises(ValueError, match=r"cannot be used.* such as") as caught:
            index.search("a", where=condition)
        assert ".rs" not in str(caught.value)

    def test_a_condition_that_fails_for_some_rows(self, index, tmp_path):
        index.add(write_images(tmp_path / "10", 1, start=1))
        with pytest.raises(ValueError, match=r"The condition .* cannot be used.* such as"):
            index.search("a", where="1 / (length(key) - " + f"{len(str(tmp_path / '10' / '1.png'))}) < 5")

    def test_more_hits_than_there_are(self, index):
        assert len(index.search("a", top=10**30)[0]) == 6
        assert 1 <= len(index.search("a", top=10**30, collapse=True)[0]) <= 6

    def test_near_copies_are_shown_once(self, index, photos):
        shutil.copy(photos / "0.png", photos / "copy.png")
        index.add(photos)
        query = f"image:{photos / '0.png'}"
        assert set(names(index.search(query, top=2)[0])) == {"0.png", "copy.png"}
        collapsed = index.search(query, top=7, collapse=True)[0]
        assert len({"0.png", "copy.png"} & set(names(collapsed))) == 1

    @pytest.mark.parametrize(
        ("query", "message"),
        [
            (" ", "query is empty"),
            ("image:", "query is empty"),
            ("image:none.png", "none.png: does not exist"),
            (3, "query 3 is not a text"),
            ("a \udcff", "not text in UTF-8"),
        ],
    )
    def test_bad_queries(self, index, query, message):
        with pytest.raises(ValueError, match=message):
            index.search(query)
        with pytest.raises(ValueError, match="There is no query"):
            index.search()
        with pytest.raises(ValueError, match="top=0"):
            index.search("a", top=0)
        with pytest.raises(ValueError, match="Nothing is left of the query 'a'"):
            index.search("a", minus=["a"])

    def test_rows_can_be_removed_and_read(self, index, photos):
        assert index.remove("key LIKE '%/0.png' OR key LIKE '%/1.png'") == 2
        assert len(index) == 4
        rows = index.to_datasets()
        assert sorted(Path(row["key"]).name for row in rows) == ["2.png", "3.png", "4.png", "5.png"]
        assert {len(row["vector"]) for row in rows} == {16}
        with pytest.raises(ValueError, match="cannot be used"):
            index.remove("everything")
        assert repr(index).startswith("<index of 4 images in ")


class TestWithoutHubs:
    def test_words_are_scored_less_the_prior_and_images_by_cosine(self, tiny_folder, photos, tmp_path):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        encoder = load_encoder(folder)
        texts = encoder.encode_texts(["a", "b", "c"])
        bank = Bank(texts.half(), texts.half(), scale=10.0)
        save_bank(bank, folder)
        index = clipmini.open_index(tmp_path / "photos.index", folder)
        index.add(photos)
        images = encoder.encode_images(sorted(photos.iterdir()))
        priors = bank.prior_of_images(images)
        expected = {
            f"{row}.png": score
            for row, score in enumerate((images @ encoder.encode_texts(["x"])[0] - priors).tolist())
        }
        (found,) = index.search("x", top=6)
        scanned = clipmini.search(folder, photos, "x", top=6, use_index=False)
        assert found.scoring == scanned.scoring == "normalized"
        assert {hit.name: hit.score for hit in found} == pytest.approx(expected, abs=2e-3)
        assert {hit.name: hit.score for hit in scanned} == pytest.approx(expected, abs=2e-3)
        assert names(found) == sorted(expected, key=expected.get, reverse=True)
        (by_image,) = index.search(f"image:{photos / '0.png'}", top=1)
        assert (by_image.scoring, by_image[0].score) == ("cosine", pytest.approx(1, abs=2e-3))
        words, image = index.search("x", f"image:{photos / '0.png'}", top=6)  # each is scored as it is alone
        assert (words.scoring, image.scoring) == ("normalized", "cosine")
        assert words.to_dict() == found.to_dict()
        both = clipmini.search_each(folder, photos, ["x", f"image:{photos / '0.png'}"], use_index=False)
        assert [hits.scoring for hits in both] == ["normalized", "cosine"]
        (mixed,) = index.search("x", plus=[f"image:{photos / '0.png'}"])
        assert mixed.scoring == "cosine"
        # Another bank is another model: priors would not fit.
        save_bank(Bank(texts[:2].half(), texts.half(), scale=10.0), folder)
        with pytest.raises(ValueError, match="another model, or another version"):
            clipmini.open_index(index.path).search("x")


class TestModels:
    @pytest.fixture
    def other_folder(self, tmp_path, tiny_folder):
        folder = tmp_path / "other"
        shutil.copytree(tiny_folder, folder)
        model = ClipMiniModel.from_pretrained(folder)
        torch.nn.init.normal_(model.visual_projection.weight)
        model.save_pretrained(folder)
        return folder

    def test_another_is_refused_before_it_is_loaded(self, index, other_folder):
        with pytest.raises(ValueError, match=r"was made with .*model, and .*other is another model"):
            clipmini.open_index(index.path, other_folder)

    def test_one_that_is_loaded_is_known_by_its_weights(self, index, other_folder):
        with pytest.raises(ValueError, match="another model, or another version"):
            Index(index.path, load_encoder(other_folder)).search("a")

    def test_one_that_has_moved_is_named(self, index, tiny_folder, tmp_path):
        moved = tmp_path / "moved"
        shutil.copytree(tiny_folder, moved)
        manifest = Path(index.path, "manifest.json")
        facts = json.loads(manifest.read_text())
        manifest.write_text(json.dumps({**facts, "model": str(tmp_path / "gone")}))
        with pytest.raises(ValueError, match=r"cannot be loaded: .*gone does not exist.*If it has moved, name it"):
            clipmini.open_index(index.path).search("a")
        assert len(clipmini.open_index(index.path, moved).search("a")[0]) == 6

    def test_one_that_is_loaded_has_no_name_to_record(self, index, tiny_folder, tmp_path):
        model = clipmini.load(tiny_folder, "cpu")
        for path in (index.path, tmp_path / "new.index"):
            with pytest.raises(ValueError, match=r"ClipMiniModel is not a name.*records its model"):
                clipmini.open_index(path, model)
        assert not (tmp_path / "new.index").exists()

    def test_models_of_other_libraries(self, clip_folder, photos, tmp_path):
        index = clipmini.open_index(tmp_path / "clip.index", clip_folder)
        assert index.add(photos).num_embedded == 6
        assert len(clipmini.open_index(index.path).search("a", top=2)[0]) == 2


class TestFiles:
    def test_an_index_is_told_from_a_model(self, index, tiny_folder, photos):
        assert is_index(index.path)
        assert not is_index(tiny_folder)
        assert not is_index(photos)
        for path in (tiny_folder, photos, "none"):
            with pytest.raises(ValueError, match=r"is no index: it has no manifest.json"):
                clipmini.open_index(path)

    def test_other_files_are_left_alone(self, photos, tiny_folder):
        with pytest.raises(ValueError, match=r"holds other files, such as 0.png"):
            clipmini.open_index(photos, tiny_folder)
        with pytest.raises(ValueError, match="is a file"):
            clipmini.open_index(photos / "0.png", tiny_folder)

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", "incomplete or damaged"),
            ("[]", "incomplete or damaged"),
            ('{"schema_version": 1}', "incomplete or damaged"),
            ('{"schema_version": 2}', "version 2, and this clipmini reads version 1"),
            ({"num_dimensions": 7}, "incomplete or damaged: its table has other columns"),
            ({"num_dimensions": "16"}, "incomplete or damaged"),
        ],
    )
    def test_damaged_manifest(self, index, content, message):
        file = Path(index.path, "manifest.json")
        if isinstance(content, dict):
            content = json.dumps({**json.loads(file.read_text()), **content})
        file.write_text(content)
        with pytest.raises(ValueError, match=message):
            clipmini.open_index(index.path)

    @pytest.mark.parametrize("folder", ["data", "_versions"])
    @pytest.mark.parametrize(
        "use",
        [
            lambda index, photos: index.search("a"),
            lambda index, photos: index.search("a", where="width > 0"),
            lambda index, photos: index.search(f"image:{photos}/1.png"),
            lambda index, photos: index.add(photos),
            lambda index, photos: index.remove("width > 0"),
            lambda index, photos: index.to_datasets(),
        ],
    )
    def test_truncated_table(self, index, photos, folder, use):
        for file in Path(index.path, "images.lance", folder).iterdir():
            file.write_bytes(file.read_bytes()[:20])
        with pytest.raises(ValueError, match=r"is incomplete or damaged.*make it anew") as caught:
            use(Index(index.path, index.encoder), photos)
        assert ".rs" not in str(caught.value)

    def test_a_disk_that_is_full(self, index, photos, tmp_path):
        """Whatever is written: the table of a new index, removed rows, dropped rows."""
        (photos / "0.png").unlink()
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            for write in (
                lambda: Index.create(tmp_path / "new.index", index.encoder),
                lambda: index.remove("key like '%1.png'"),
                lambda: index.add(photos),
            ):
                with pytest.raises(ValueError, match=r"cannot be written: .*File too large.*is safe") as caught:
                    write()
                assert ".rs" not in str(caught.value)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(index) == 6
        assert index.add(photos).num_dropped == 1
        assert len(Index.create(tmp_path / "new.index", index.encoder)) == 0

    def test_an_empty_index(self, tmp_path, tiny_folder):
        index = clipmini.open_index(tmp_path / "empty.index", tiny_folder)
        assert len(index.search("a")[0]) == len(index.to_datasets()) == index.remove("width > 0") == 0

    def test_a_run_killed_at_its_start_leaves_no_obstacle(self, tmp_path, tiny_folder, photos, monkeypatch):
        path = tmp_path / "killed.index"
        monkeypatch.setattr("clipmini.indexing.index._write_manifest", lambda *args: 1 / 0)
        with pytest.raises(ValueError, match="cannot be written: division by zero"):
            clipmini.open_index(path, tiny_folder)
        monkeypatch.undo()
        assert not is_index(path)
        (path / ".clipmini-tmp-1").mkdir()
        (path / ".clipmini-tmp-1" / "new").write_text("{")  # half a manifest
        assert clipmini.open_index(path, tiny_folder).add(photos).num_embedded == 6

    def test_a_table_of_somebody_else_is_not_replaced(self, tmp_path, tiny_folder):
        table = lancedb.connect(tmp_path / "other").create_table("images", [{"mine": 1}])
        for path in (tmp_path / "other", f"file://{tmp_path}/other"):
            with pytest.raises(ValueError, match="holds a table 'images' that is no index"):
                clipmini.open_index(path, tiny_folder)
        assert table.to_arrow().to_pylist() == [{"mine": 1}]

    def test_an_address(self, tmp_path, tiny_folder, photos):
        """Object storage is addressed alike."""
        address = f"file://{tmp_path}/stored.index"
        index = clipmini.open_index(address, tiny_folder)
        index.add(photos)
        assert is_index(address)
        assert len(Index(address).search("a", top=3)[0]) == 3

    @pytest.mark.parametrize("name", ["a::b", "a#b%20c?", "it's [1] *"])
    def test_odd_names_of_folders(self, tmp_path, tiny_folder, photos, name):
        clipmini.open_index(tmp_path / name, tiny_folder).add(photos)
        assert len(clipmini.open_index(tmp_path / name).search("a")[0]) == 6

    def test_it_moves_as_a_folder_does(self, index, tmp_path):
        shutil.move(index.path, tmp_path / "elsewhere")
        assert len(clipmini.open_index(tmp_path / "elsewhere").search("a")[0]) == 6


class TestKeptIndex:
    """`clipmini search MODEL FOLDER` keeps an index in the cache."""

    @pytest.fixture
    def embedded(self, monkeypatch):
        counts = []
        embed = ClipMiniModel.embed_pixels
        monkeypatch.setattr(
            ClipMiniModel, "embed_pixels", lambda self, batch: counts.append(len(batch)) or embed(self, batch)
        )
        return counts

    def test_the_second_search_embeds_nothing(self, tiny_folder, photos, embedded):
        first = clipmini.search(tiny_folder, photos, "a")
        second = clipmini.search(tiny_folder, photos, "a")
        assert first.to_dict() == second.to_dict()
        assert sum(embedded) == 6
        clipmini.search(tiny_folder, photos, "a", use_index=False)
        assert sum(embedded) == 12

    def test_one_of_other_weights_or_damaged_is_made_anew(self, tiny_folder, photos, tmp_path, embedded, caplog):
        folder = tmp_path / "model"
        shutil.copytree(tiny_folder, folder)
        clipmini.search(folder, photos, "a")
        model = ClipMiniModel.from_pretrained(folder)
        torch.nn.init.normal_(model.visual_projection.weight)
        model.save_pretrained(folder)
        hits = clipmini.search(folder, photos, "a")
        assert sum(embedded) == 12
        expected = clipmini.search(folder, photos, "a", use_index=False)
        assert [hit.score for hit in hits] == pytest.approx([hit.score for hit in expected], abs=2e-3)
        assert "It is made anew" in caplog.text

    def test_in_a_cache_that_cannot_be_written_every_image_is_looked_at(
        self, tiny_folder, photos, monkeypatch, caplog, tmp_path
    ):
        (tmp_path / "file").touch()
        monkeypatch.setattr(find, "indexes_folder", lambda: tmp_path / "file")
        assert len(clipmini.search(tiny_folder, photos, "a")) == 6
        assert "cannot be written: Not a directory. Until then, every image is embedded anew" in caplog.text
        with pytest.raises(ValueError, match="cannot be written"):
            clipmini.search_each(tiny_folder, photos, ["a"], where="width > 0")

    def test_it_is_listed_and_cleared_with_the_cache(self, tiny_folder, photos):
        clipmini.search(tiny_folder, photos, "a")
        (space,) = store.spaces()
        assert (space.description, space.num_rows) == (f"index of {photos}", 6)
        assert space.num_bytes > 6 * 2 * 24
        with FileLock(space.folder / LOCK_FILE):
            assert store.clear() == []
        assert [space.folder for space in store.clear()] == [space.folder]
        assert store.spaces() == []

    def test_without_lancedb_every_image_is_looked_at(self, run, tiny_folder, photos, embedded, monkeypatch):
        find_spec = importlib.util.find_spec
        monkeypatch.setattr(find, "find_spec", lambda name: None if name == "lancedb" else find_spec(name))
        monkeypatch.setitem(sys.modules, "lancedb", None)
        monkeypatch.delitem(sys.modules, "clipmini.indexing.index")
        found = run("search", tiny_folder, photos, "a", "--json")
        assert len(json.loads(found.stdout)["hits"]) == sum(embedded) == 6
        assert found.stderr.count("pip install 'clipmini[search]'") == 1
        refused = run("index", tiny_folder, photos, "--out", photos.with_name("x.index"))
        assert refused.exit_code == 2
        assert "An index needs lancedb: pip install 'clipmini[search]'." in refused.stderr


def test_commands(run, tiny_folder, photos, tmp_path):
    out = tmp_path / "photos.index"
    made = run("index", tiny_folder, photos, "--out", out, "--json")
    assert json.loads(made.stdout)["num_embedded"] == 6
    again = run("index", tiny_folder, photos, "--out", out)
    assert "unchanged" in again.stdout
    assert f"clipmini search {out}" in again.stdout
    one = json.loads(run("search", out, "a", "--top", 2, "--json").stdout)
    assert [one["query"], len(one["hits"])] == ["a", 2]
    two = json.loads(run("search", out, "a", f"image:{photos / '1.png'}", "--plus", "b", "--json").stdout)
    assert [hits["query"] for hits in two] == ["a + b", f"image:{photos / '1.png'} + b"]
    assert run("search", out, "a", "--out", tmp_path / "grid.png").exit_code == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 100
    for option in ("--strict", "--no-index"):
        refused = run("search", out, "a", option)
        assert (refused.exit_code, f"{option} is for a folder" in refused.stderr) == (2, True)
    refused = run("index", tiny_folder, tmp_path / "none", "--out", out)
    assert (refused.exit_code, "none does not exist" in refused.stderr) == (2, True)


@pytest.fixture
def run():
    return lambda *arguments: CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
