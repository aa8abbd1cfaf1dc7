"""The page: what its actions answer, and what a visitor cannot reach."""

import json
import re
import signal
import sys
from types import SimpleNamespace

import pytest
from PIL import Image
from starlette.testclient import TestClient
from typer.testing import CliRunner

import clipmini
from clipmini import cli
from clipmini.inference.encoders import load_encoder
from serving import serve_command

pytest.importorskip("gradio", reason="the lowest versions of the rest and gradio do not go together")

from clipmini.indexing import app
from clipmini.indexing.app import (
    MAX_UPLOAD_MIB,
    THUMBNAIL_EDGE,
    Actions,
    Page,
    create_app,
    open_upload,
)

SECRET = "/etc/passwd"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number, (name, color) in enumerate((("red", "red"), ("green & <b>", "green"), ("blue", "blue"))):
        Image.new("RGB", (900 + number, 600), color).save(folder / f"{name}.jpg")
    return folder


@pytest.fixture(scope="module")
def page(tiny_folder, images, tmp_path_factory):
    index = clipmini.open_index(tmp_path_factory.mktemp("index") / "index", tiny_folder)
    index.add(images)
    return Page(index.encoder, index)


@pytest.fixture
def actions(page):
    return Actions(page)


@pytest.fixture
def uploads(tmp_path, monkeypatch):
    """The folder in which Gradio keeps what is uploaded."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "uploads"))
    (tmp_path / "uploads").mkdir()
    return tmp_path / "uploads"


@pytest.fixture
def dropped(uploads, images):
    """An image as a browser names it once it is uploaded."""
    (uploads / "image.jpg").write_bytes((images / "blue.jpg").read_bytes())
    return as_file(uploads / "image.jpg")


def as_file(path):
    return {"path": str(path), "meta": {"_type": "gradio.FileData"}}


class TestSearch:
    def test_words_and_images(self, page, images):
        assert len(page.search("a red square")) == 3
        blue = Image.open(images / "blue.jpg")
        (hit,) = page.search("", blue, top=1)
        assert hit.name == "blue.jpg"
        both = page.search("a red square", blue, plus="at night", minus="a crowd")
        assert [hit.score for hit in both] == [
            hit.score for hit in page.index.search("a red square", plus=[blue, "at night"], minus=["a crowd"])[0]
        ]
        assert len(page.search("a", where="width > 900")) == 2
        assert len(page.search("a", top=10**6)) == 3

    def test_what_another_process_added_is_found(self, page, images, tmp_path):
        Image.new("RGB", (50, 50), "white").save(tmp_path / "white.png")
        clipmini.open_index(page.index.path).add(tmp_path)
        try:
            assert len(page.search("a")) == 4
        finally:
            clipmini.open_index(page.index.path).remove("key like '%white.png'")

    @pytest.mark.parametrize(
        ("typed", "words"),
        [
            ({"words": " "}, "nothing to search for"),
            ({"words": f"image:{SECRET}"}, "names a file"),
            ({"words": "a", "plus": f" IMAGE:{SECRET}"}, "names a file"),
            ({"words": "a", "minus": f"image:{SECRET}"}, "names a file"),
            ({"words": "a" * 1001}, "1001 characters"),
            ({"words": "a", "where": "widht > 1"}, "widht"),
            ({"words": "a", "top": 0}, "top=0"),
        ],
    )
    def test_what_is_not_allowed(self, page, typed, words):
        with pytest.raises(ValueError, match=words):
            page.search(**typed)

    def test_grid(self, actions, dropped):
        message, gallery, found, results, detail = actions.search("a red square", None, "", "", "", 2, True)
        assert "2 of 3 images" in message
        assert results.visible
        assert not detail.visible
        for (thumbnail, caption), hit in zip(gallery.constructor_args["value"], found[0], strict=True):
            assert max(thumbnail.size) == THUMBNAIL_EDGE
            assert hit.name in caption
        assert found[1] == "a red square"
        assert actions.search("", dropped)[2][0][0].name == "blue.jpg"

    def test_nothing_and_errors_are_one_calm_sentence(self, actions, uploads):
        message, *_, results, _ = actions.search("a", None, "", "", "width > 9000", 9, True)
        assert "No image meets the condition" in message
        assert not results.visible
        for values in (("a", None, "", "", "<b>"), ("", None), ("a", as_file(SECRET)), ("a", as_file(uploads / "x"))):
            message, *_, results, _ = actions.search(*values)
            assert re.fullmatch(r'<p class="error" role="alert">[^<]+</p>', message)
            assert not results.visible

    def test_thumbnails_are_upright(self, tmp_path):
        exif = Image.Exif()
        exif[274] = 6  # its right is up
        image = Image.new("RGB", (2000, 1000), "blue")
        image.paste("red", (0, 0, 1000, 1000))
        for name in ("rotated.jpg", "rotated.png"):
            image.save(tmp_path / name, exif=exif)
            thumbnail = app._shrink(tmp_path / name, 100)
            assert thumbnail.size == (50, 100)
            assert thumbnail.getpixel((25, 10))[0] > 250


class TestChosenHit:
    def test_with_and_without_its_map(self, actions):
        found = actions.search("a red square", None)[2]
        hit, detail, mapped, about = actions.choose(found, True, SimpleNamespace(index=1))
        assert hit == found[0][1]
        assert detail.visible
        assert "like “a red square”" in about
        with_map, plain, about = actions.switch(found, hit, SimpleNamespace(selected=False))
        assert not with_map
        assert mapped.size == plain.size
        assert mapped.tobytes() != plain.tobytes()
        assert "like" not in about

    def test_names_are_escaped(self, actions):
        found = actions.search("a", None)[2]
        hit = next(hit for hit in found[0] if "green" in hit.name)
        assert "green &amp; &lt;b&gt;.jpg" in actions.switch(found, hit, SimpleNamespace(selected=False))[2]

    def test_more_like_it(self, actions, images):
        words, image = actions.take(actions.search("a", None, "", "", "", 1)[2][0][0])
        assert words == ""
        assert image.size[0] in (900, 901, 902)

    def test_an_image_that_is_gone(self, tiny_folder, tmp_path):
        (tmp_path / "images").mkdir()
        Image.new("RGB", (40, 30), "red").save(tmp_path / "images" / "red.png")
        index = clipmini.open_index(tmp_path / "index", tiny_folder)
        index.add(tmp_path / "images")
        (tmp_path / "images" / "red.png").unlink()
        actions = Actions(Page(index.encoder, index))
        found = actions.search("a", None)[2]
        hit, _, picture, about = actions.choose(found, True, SimpleNamespace(index=0))
        assert picture is None
        assert "does not exist" in about
        with pytest.raises(app.gr.Error, match="does not exist"):
            actions.take(hit)


def test_words_that_the_model_cannot_read(actions):
    options = "", "", 24, True
    assert "cannot read" not in actions.search("a fox", None, "a dog", *options)[0]
    assert "cannot read 1 of 2 texts (50%), such as &#x27;狐&#x27;" in actions.search("a fox", None, "狐", *options)[0]


class TestLabels:
    def test_probabilities_and_map(self, actions, page, dropped, images):
        labels, picture, message = actions.label(dropped, "a cat, a dog,")
        (expected,) = clipmini.classify(page.encoder, images / "blue.jpg", ["a cat", "a dog"])
        assert labels.visible
        assert set(page.label(open_upload(dropped), '"Paris, France", a dog')) == {"Paris, France", "a dog"}
        assert page.label(open_upload(dropped), "a cat, a dog") == {item.label: item.score for item in expected.scores}
        assert picture.visible
        assert expected.label in message
        assert "a dog" in actions.look(dropped, SimpleNamespace(value="a dog"))[1]

    def test_labels_that_the_model_cannot_read(self, actions, dropped):
        assert "cannot read" not in actions.label(dropped, "a cat, a dog")[2]
        assert "cannot read 1 of 2 texts (50%), such as &#x27;狗&#x27;" in actions.label(dropped, "a cat, 狗")[2]

    def test_errors(self, actions, dropped):
        cases = [
            (None, "a", "Drop an image"),
            (dropped, " ,", "label"),
            (dropped, "a,a", "twice"),
            (dropped, "A,a", "one text"),
        ]
        for file, labels, words in cases:
            scores, picture, message = actions.label(file, labels)
            assert not scores.visible
            assert not picture.visible
            assert words in message

    def test_a_model_without_a_map(self, tiny_folder, dropped):
        encoder = load_encoder(tiny_folder)
        names = ("processor", "device", "embed_pixels", "embed_captions", "get_logit_scale")
        encoder.model = SimpleNamespace(**{name: getattr(encoder.model, name) for name in names})  # as of graphs
        actions = Actions(Page(encoder))
        scores, picture, message = actions.label(dropped, "a cat, a dog")
        assert scores.visible
        assert not picture.visible
        assert "no clipmini model" in message


class TestOverHttp:
    @pytest.fixture
    def client(self, page, uploads):
        with TestClient(create_app(page, "runs/demo/model")) as client:
            yield client

    def join(self, client, *data):
        functions = {function["api_name"]: function["id"] for function in client.get("/config").json()["dependencies"]}
        body = {"data": data, "fn_index": functions["search"], "session_hash": "test"}
        return client.post("/gradio_api/queue/join", json=body)

    def test_browsers_fetch_nothing_from_elsewhere(self, client):
        response = client.get("/")
        assert response.headers["content-security-policy"].startswith("default-src 'self'")
        fetched = re.findall(r'(?:src|href)="(https?:[^"]+)', response.text)
        assert fetched == []
        assert "http" not in client.get("/theme.css").text.replace("http://www.w3.org", "")

    def test_only_uploads_can_be_named(self, client, uploads, dropped, images, page):
        assert self.join(client, "a", None).status_code == 200
        assert self.join(client, "", dropped).status_code == 200
        for path in (SECRET, "https://example.com/a.png", str(images / "red.jpg"), f"{uploads}/../x", "", 5):
            assert self.join(client, "a", as_file(path)).status_code == 403
            assert self.join(client, "a", None, [{"deeper": as_file(path)}]).status_code == 403
        for path in (SECRET, "https://example.com/a.png", str(images / "red.jpg"), page.index.path):
            assert client.get(f"/gradio_api/file={path}").status_code == 403

    def test_bodies(self, client):
        large = b"a" * (MAX_UPLOAD_MIB * 2**20 + 1)
        assert client.post("/gradio_api/upload", files={"files": ("a.png", large)}).status_code == 413
        assert client.post("/gradio_api/queue/join", content=large).status_code == 413
        assert client.post("/gradio_api/queue/join", content=iter([b"{}"])).status_code == 413
        for body in (b"{", b"[" * 100_000, b"\xff"):
            assert client.post("/gradio_api/queue/join", content=body).status_code == 400

    def test_a_page_without_an_index_says_how_to_search(self, page, uploads):
        with TestClient(create_app(Page(page.encoder), "runs/demo/model")) as client:
            config = json.dumps(client.get("/config").json())
        assert "clipmini app runs/demo/model --index FOLDER" in config
        assert "What should the images show?" not in config


class TestCommand:
    @pytest.mark.slow
    def test_serves_until_ctrl_c(self, tiny_folder, images, monkeypatch):
        from gradio_client import Client, handle_file

        options = ("--index", str(images))
        with serve_command(tiny_folder, "app", *options) as (url, process):
            client = Client(url, verbose=False, analytics_enabled=False)
            found = client.predict("", handle_file(images / "blue.jpg"), "", "", "", 2, True, api_name="/search")
            assert "2 of 3 images" in found[0]
            assert "blue.jpg" in found[1]["value"][0]["caption"]
            process.send_signal(signal.SIGINT)
            rest, errors = process.communicate(timeout=60)
        assert (process.returncode, rest, errors) == (0, "", "")

    def test_bad_input(self, tiny_folder, tmp_path):
        for options, words in (
            (["--index", str(tmp_path / "none")], "none does not exist"),
            (["--host", "256.0.0.1"], "256.0.0.1"),
        ):
            result = CliRunner().invoke(cli.app, ["app", str(tiny_folder), *options])
            assert (result.exit_code, result.stdout) == (2, "")
            assert words in result.stderr

    def test_without_the_extra(self, tiny_folder, monkeypatch):
        monkeypatch.setitem(sys.modules, "gradio", None)
        monkeypatch.delitem(sys.modules, "clipmini.indexing.app")
        result = CliRunner().invoke(cli.app, ["app", str(tiny_folder)])
        assert result.exit_code == 2
        assert result.stderr == "error: app needs gradio, which is not installed: pip install 'clipmini[app]'.\n"
