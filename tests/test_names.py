"""Names of models and data: what is a path, what is on the Hub, and what is said where there is no Hub."""

import shutil
import socket
import time

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import close_session

import clipmini
from clipmini import names
from clipmini.data.images import folder_of
from clipmini.data.pairs import load_pairs
from clipmini.names import expand, hub_id, locate, public_name
from clipmini.recipe_files import check_origin, read_recipe
from hub_repositories import Repository


@pytest.mark.parametrize("folder", ["runs/demo/model", "data", "a/b"])
def test_a_path_whose_folder_is_here_is_never_looked_up_on_the_hub(folder, tmp_path, monkeypatch):
    (tmp_path / folder).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(names, "_find_on_hub", lambda name, kind: pytest.fail("asked the Hub"))
    first = folder.split("/")[0]
    for name in (f"{first}/nothing", f"{first}/x.csv", "../no/folder", "~/nothing", "pairs.jsonl"):
        with pytest.raises(ValueError, match="does not exist"):
            locate(name, "a folder", "dataset")
    assert hub_id(f"{first}/nothing") is None
    assert public_name(f"{first}/nothing") == "nothing"
    assert locate(f"./{first}", "a folder") == f"./{first}"
    with pytest.raises(ValueError, match=f"{first}/nothing does not exist here \\(in {tmp_path}\\)"):
        clipmini.load(f"{first}/nothing")


@pytest.mark.parametrize("name", ["my/table.csv", "my/recipe.yaml", "my/a.JPG", "my/model.safetensors"])
def test_what_ends_like_a_file_is_a_path(name):
    assert hub_id(name) is None


def test_a_tilde_that_is_no_home_folder_is_a_letter():
    assert expand("~$lock.jpg") == "~$lock.jpg"
    with pytest.raises(ValueError, match=r"~nobody-here/model does not exist"):
        locate("~nobody-here/model", "a folder")


def test_versions_in_a_name_are_no_suffix():
    assert hub_id("timm/resnet50.a1_in1k") == "timm/resnet50.a1_in1k"


class TestPhotographs:
    def test_are_named_wherever_data_are(self, tiny_folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert {name: len(rows) for name, rows in load_pairs("offline:photos").items()} == {
            "train": 168,
            "validation": 24,
            "test": 32,
        }
        image = "offline:photos/test/solar_system_sun.webp"
        assert clipmini.search(tiny_folder, [image], "the sun")[0].image.name == "solar_system_sun.webp"
        assert clipmini.classify(tiny_folder, image, ["sun", "moon"])[0].image.is_file()

    def test_keep_their_name_where_it_is_published(self):
        assert public_name("offline:photos/test") == "offline:photos/test"

    @pytest.mark.parametrize(
        "name",
        [
            "offline:phtos",
            "offline:",
            "offline:photos/tst",
            "offline:minilm-l6",
            "offline:photos//etc",
            "offline:photos/../..",
        ],
    )
    def test_a_mistyped_name_is_told(self, name):
        with pytest.raises(ValueError, match=f"There is no {name}; offline:photos names"):
            load_pairs(name)


class TestFolderOf:
    def test_says_where_the_images_are_as_the_user_does(self, tmp_path, monkeypatch):
        for name in ("test/a.png", "test/b/c.png", "train/d.png"):
            (tmp_path / "my images" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "my images" / name).touch()
        monkeypatch.chdir(tmp_path)
        paths = [str(tmp_path / "my images" / name) for name in ("test/a.png", "test/b/c.png")]
        assert folder_of("my images", paths) == "my images/test"
        assert folder_of("my images", [*paths, str(tmp_path / "my images/train/d.png")]) == "my images"
        assert folder_of("table.csv", paths) == "my images/test"
        assert folder_of(str(tmp_path), paths[:1]) == f"{tmp_path}/my images/test"
        assert folder_of("offline:photos", [f"{expand('offline:photos/test')}/solar_system_sun.webp"]) == (
            "offline:photos/test"
        )

    def test_images_without_files_are_in_no_folder(self, tmp_path):
        (tmp_path / "a.png").touch()
        for paths in ([], [None], ["a.png"], [str(tmp_path / "a.png"), None], ["https://example.org/a.png"]):
            assert folder_of("org/pairs", paths) is None


@pytest.fixture
def cached(tiny_folder, tmp_path, monkeypatch):
    """A cache of the Hub in which org/tiny is complete, and org/half lacks its weights."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    for name in ("tiny", "half"):
        repository = tmp_path / "cache" / f"models--org--{name}"
        shutil.copytree(tiny_folder, repository / "snapshots" / ("0" * 40))
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text("0" * 40)
    (repository / "snapshots" / ("0" * 40) / "model.safetensors").unlink()


@pytest.fixture(params=["silent", "refusing", "offline"])
def no_hub(request, monkeypatch):
    """A Hub that accepts connections and never answers, one that refuses them, and the offline mode."""
    if request.param == "offline":
        yield
        return
    with socket.create_server(("127.0.0.1", 0)) as server:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(names, "HUB_TIMEOUT_S", 0.2)
        monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        close_session()
        if request.param == "refusing":
            server.close()
        yield
        close_session()


class TestWithoutTheHub:
    def test_a_model_that_is_not_here_is_named_with_the_remedy(self, no_hub, cached, caplog):
        start = time.monotonic()
        for name in ("org/none", "org/half"):
            with pytest.raises(ValueError, match=f"{name} is neither here .* cannot be reached .*model=lite0-minilm"):
                clipmini.load(name)
        with pytest.raises(ValueError, match="org/none is neither here"):
            clipmini.evaluate("org/none", "offline:photos/test")
        assert time.monotonic() - start < 20
        assert len(caplog.records) <= 1

    def test_so_is_a_data_set(self, no_hub, cached, tiny_folder):
        for call in (
            lambda: clipmini.train("demo", source="org/pairs"),
            lambda: clipmini.evaluate(tiny_folder, "org/pairs"),
            lambda: load_pairs("org/pairs"),
        ):
            with pytest.raises(ValueError, match=r"data set org/pairs is neither here .* cannot be reached"):
                call()

    def test_a_push_at_the_end_is_refused_at_the_start(self, no_hub, tmp_path):
        options = {"output_dir": tmp_path / "run", "push_to_hub": True, "hub_model_id": "org/new"}
        with pytest.raises(ValueError, match=r"push_to_hub needs the Hub, which cannot be reached .*leave it out"):
            clipmini.train("demo", **options)

    def test_a_model_that_is_whole_in_the_cache_is_loaded(self, no_hub, cached):
        model = clipmini.load("org/tiny")
        assert model.encode_text("a cat").shape == (16,)
        assert model.name_or_path == "org/tiny"  # under which reports name it
        hits = clipmini.search("org/tiny", "offline:photos/test", "a cat", top=1)
        assert len(hits) == 1

    def test_the_towers_of_a_recipe_are_looked_for_before_its_data(self, no_hub, cached, tmp_path):
        for recipe, options in (("article", {"source": tmp_path}), ("demo", {"model": "resnet50-distilbert"})):
            with pytest.raises(ValueError, match=r"timm/resnet50\.a1_in1k is neither .*model=lite0-minilm"):
                clipmini.train(recipe, output_dir=tmp_path / "run", **options)
        check_origin(read_recipe("demo", {}))
        check_origin(read_recipe("demo", {"model": "tiny"}))


def test_what_the_hub_does_not_have_is_told(hub):
    hub.models["org/there"] = Repository("org/there")
    assert locate("org/there", "a folder") == "org/there"
    with pytest.raises(ValueError, match=r"org/gone does not exist here \(in .*\), and the Hub has no model of this"):
        clipmini.load("org/gone")
    with pytest.raises(ValueError, match="the Hub has no data set of this name that you may read"):
        load_pairs("org/gone")
    hub.fail("GET /api/models/org/here", status=401, times=1)
    with pytest.raises(ValueError, match=r"\(it answers with status 401: log in anew"):
        clipmini.load("org/here")
    hub.fail("GET /api/models/org/here", status=503, times=9)
    with pytest.raises(ValueError, match=r"cannot be reached \(it answers with status 503"):
        clipmini.load("org/here")
    hub.fail("GET /api/models/org/there", status=503, times=9)  # where one process has found it, it does not ask again
    assert locate("org/there", "a folder") == "org/there"
