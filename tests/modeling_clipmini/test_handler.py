"""Requests as Hugging Face's clients send them: the pipeline's answers, and an error for everything else."""

import ast
import base64
import io
import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageFile
from transformers import pipeline

from clipmini.inference.embed import load_model
from modeling_clipmini import ClipMiniModel
from modeling_clipmini import handler as handler_module
from modeling_clipmini.handler import EndpointHandler, RequestError, RequestHandler, read_content
from stranger import run_as_stranger

LABELS = ["a red square", "a blue disc", "nothing at all"]
LONG_LABEL = "a label of very many words " * 200


def make_image(size=(200, 120)):
    return Image.merge(
        "RGB", [Image.linear_gradient("L").resize(size).rotate(90 * turn).resize(size) for turn in range(3)]
    )


def encoded(image, kind="PNG", **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def in_base64(image):
    return base64.b64encode(encoded(image)).decode()


@pytest.fixture(scope="module")
def handler(tiny_folder):
    return RequestHandler(load_model(tiny_folder))


@pytest.fixture(scope="module")
def classify(tiny_folder):
    return pipeline("zero-shot-image-classification", model=str(tiny_folder))


def assert_same(answer, expected):
    assert [item["label"] for item in answer] == [item["label"] for item in expected]
    assert [item["score"] for item in answer] == pytest.approx([item["score"] for item in expected], abs=1e-5)


FORMS = {
    "Python client": lambda image: {"inputs": in_base64(image)},
    "JavaScript client": lambda image: {"inputs": {"image": in_base64(image)}},
    "widget": lambda image: {"image": in_base64(image)},
    "data URL": lambda image: {"inputs": f"data:image/png;base64,{in_base64(image)}"},
    "base64 in lines": lambda image: {"inputs": base64.encodebytes(encoded(image)).decode()},
    "bytes": lambda image: {"inputs": encoded(image)},
    "Inference Endpoints with image/png": lambda image: {"inputs": image},
}


class TestZeroShot:
    @pytest.mark.parametrize("form", FORMS)
    def test_every_form_of_an_image_gets_the_scores_of_the_pipeline(self, handler, classify, form):
        request = {**FORMS[form](make_image()), "parameters": {"candidate_labels": LABELS}}
        before = json.dumps(request, default=str)
        assert_same(handler(request), classify(make_image(), candidate_labels=LABELS))
        assert json.dumps(request, default=str) == before

    @pytest.mark.parametrize("template", ["{}", "a photo of a {}.", "{} as a drawing"])
    def test_template(self, handler, classify, template):
        parameters = {"candidate_labels": LABELS, "hypothesis_template": template}
        answer = handler({"inputs": make_image(), "parameters": parameters})
        assert_same(answer, classify(make_image(), candidate_labels=LABELS, hypothesis_template=template))

    def test_other_braces_of_a_template_stay(self, handler, monkeypatch):
        texts = []
        monkeypatch.setattr(handler, "_embed_labels", lambda captions, _: texts.append(captions) or torch.ones(2, 16))
        parameters = {"candidate_labels": ["a", "b"], "hypothesis_template": "{0} {label!r} {} }"}
        handler({"inputs": make_image(), "parameters": parameters})
        assert texts == [("{0} {label!r} a }", "{0} {label!r} b }")]

    def test_labels_in_one_string(self, handler):
        whole = handler({"inputs": make_image(), "parameters": {"candidate_labels": "cat , dog,fish"}})
        assert whole == handler({"inputs": make_image(), "parameters": {"candidate_labels": ["cat", "dog", "fish"]}})

    def test_many_labels_are_the_pipelines_too(self, handler, classify):
        labels = [f"thing number {number}" for number in range(300)]
        answer = handler({"inputs": make_image(), "parameters": {"candidate_labels": labels}})
        assert_same(answer, classify(make_image(), candidate_labels=labels))
        assert sum(item["score"] for item in answer) == pytest.approx(1)

    def test_a_long_label_is_cut(self, handler):
        answer = handler({"inputs": make_image(), "parameters": {"candidate_labels": [LONG_LABEL, "short"]}})
        assert {item["label"] for item in answer} == {LONG_LABEL, "short"}

    def test_several_images(self, handler):
        parameters = {"candidate_labels": LABELS}
        images = [make_image(), make_image((50, 80))]
        answers = handler({"inputs": [in_base64(image) for image in images], "parameters": parameters})
        assert len(answers) == 2
        for image, answer in zip(images, answers, strict=True):
            assert_same(answer, handler({"inputs": image, "parameters": parameters}))

    def test_bias_and_scale_are_the_models(self, tiny_config, tiny_processor):
        model = ClipMiniModel(tiny_config(loss="sigmoid")).eval()
        parameters = {"candidate_labels": LABELS, "hypothesis_template": "{}"}
        model.processor = tiny_processor
        answer = RequestHandler(model)({"inputs": make_image(), "parameters": parameters})
        with torch.no_grad():
            expected = model(**tiny_processor(images=[make_image()], text=LABELS)).logits_per_image.softmax(dim=-1)
        scores = {item["label"]: item["score"] for item in answer}
        assert [scores[label] for label in LABELS] == pytest.approx(expected[0].tolist(), abs=1e-6)

    def test_the_same_labels_are_embedded_once(self, tiny_model, tiny_processor, monkeypatch):
        calls = []
        embed = tiny_model.get_text_features
        monkeypatch.setattr(tiny_model, "get_text_features", lambda **inputs: calls.append(1) or embed(**inputs))
        handler = RequestHandler(tiny_model)
        for labels in (LABELS, LABELS, LABELS[:2]):
            handler({"inputs": make_image(), "parameters": {"candidate_labels": labels}})
        assert len(calls) == 2

    def test_threads_do_not_disturb_each_other(self, handler):
        requests = [
            {"inputs": make_image((60 + number, 60)), "parameters": {"candidate_labels": [f"{number} " * number, "b"]}}
            for number in range(1, 25)
        ]
        expected = [handler(request) for request in requests]
        handler._embed_labels.cache_clear()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(handler, requests))
        for answer, other in zip(answers, expected, strict=True):
            assert_same(answer, other)


class TestImages:
    def test_are_turned_upright(self, handler, classify):
        exif = Image.Exif()
        exif[0x0112] = 6  # turn by 270 degrees
        content = encoded(make_image(), "PNG", exif=exif)
        parameters = {"candidate_labels": LABELS}
        answer = handler({"inputs": content, "parameters": parameters})
        assert_same(answer, classify(make_image().transpose(Image.Transpose.ROTATE_270), **parameters))
        assert_same(answer, classify(Image.open(io.BytesIO(content)), **parameters))

    def test_of_an_animation_the_first_frame_counts(self, handler):
        first, second = Image.new("L", (40, 40), 10), Image.new("L", (40, 40), 240)
        content = encoded(first, "GIF", save_all=True, append_images=[second])
        parameters = {"candidate_labels": LABELS}
        assert_same(
            handler({"inputs": content, "parameters": parameters}),
            handler({"inputs": first, "parameters": parameters}),
        )

    @pytest.mark.parametrize(
        ("kind", "mode"),
        [
            ("JPEG", "CMYK"),
            ("PNG", "RGBA"),
            ("PNG", "I;16"),
            ("PNG", "1"),
            ("GIF", "P"),
            ("WEBP", "RGBA"),
        ],
    )
    def test_of_every_kind(self, handler, kind, mode):
        content = encoded(Image.new(mode, (30, 40)), kind)
        assert len(handler({"inputs": content, "parameters": {"candidate_labels": LABELS}})) == 3

    def test_large_ones_are_decoded_one_after_the_other(self, handler, monkeypatch):
        monkeypatch.setattr(handler_module, "MANY_PIXELS", 1000)
        with handler._memory_lock, ThreadPoolExecutor(2) as pool:
            small = pool.submit(handler, {"inputs": make_image((30, 30)), "parameters": {"candidate_labels": LABELS}})
            large = pool.submit(handler, {"inputs": make_image((40, 40)), "parameters": {"candidate_labels": LABELS}})
            assert len(small.result(20)) == 3
            assert not large.done()
            handler._memory_lock.release()
            assert len(large.result(20)) == 3
            handler._memory_lock.acquire()

    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    def test_are_measured_before_they_are_decoded(self, handler, monkeypatch):
        bomb = encoded_bomb(12000)
        assert len(bomb) < 20_000
        monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
        with pytest.raises(RequestError, match=r"144\.0 megapixels, over the limit of 50") as caught:
            handler(zero_shot(bomb))
        assert caught.value.status == 413


def encoded_bomb(size):
    """Hundreds of megapixels in a few kilobytes."""
    return encoded(Image.new("1", (size, size)))


class TestFeatures:
    def test_of_a_text(self, handler):
        vector = handler({"inputs": "a red square"})
        expected = torch.tensor(handler.model.encode_text(["a red square"]))[0]
        assert vector == pytest.approx(expected.tolist(), abs=1e-6)

    def test_of_texts_in_batches(self, handler, monkeypatch):
        monkeypatch.setattr(handler_module, "TEXT_BATCH", 2)
        texts = ["a", "a longer text", LONG_LABEL, "b", "c"]
        vectors = handler({"inputs": texts, "normalize": None, "prompt_name": None})
        assert torch.allclose(torch.tensor(vectors), torch.tensor(handler.model.encode_text(texts)), atol=1e-6)

    @pytest.mark.parametrize(
        "request_",
        [
            {"inputs": {"image": in_base64(make_image())}, "parameters": {"task": "feature-extraction"}},
            {"inputs": encoded(make_image()), "task": "feature-extraction"},
            {"inputs": in_base64(make_image()), "task": "image-feature-extraction"},
        ],
    )
    def test_of_an_image(self, handler, request_):
        expected = torch.tensor(handler.model.encode_image([make_image()]))[0]
        assert handler(request_) == pytest.approx(expected.tolist(), abs=1e-5)
        assert handler({**request_, "inputs": [request_["inputs"]]})[0] == pytest.approx(expected.tolist(), abs=1e-5)

    def test_length_and_width(self, handler):
        plain = torch.tensor(handler({"inputs": "a", "normalize": False}))
        assert plain.norm() != pytest.approx(1, abs=1e-3)
        cut = handler({"inputs": "a", "parameters": {"truncate_dim": 4}})
        assert cut == pytest.approx((plain[:4] / plain[:4].norm()).tolist(), abs=1e-6)
        assert handler({"inputs": "a", "dimensions": 4, "truncate": True, "encoding_format": "float"}) == cut


def zero_shot(inputs=b"", labels=("a", "b"), **parameters):
    return {"inputs": inputs, "parameters": {"candidate_labels": list(labels), **parameters}}


GOOD = encoded(make_image())
REFUSED = [
    ([], 422, "JSON object"),
    ({}, 422, "no inputs"),
    ({"inputs": GOOD, "parameters": [1]}, 422, "parameters=[1]"),
    ({"inputs": GOOD}, 422, "candidate_labels is missing"),
    ({"inputs": "a", "task": "text-generation"}, 422, "'text-generation'"),
    ({"inputs": "a", "task": ["a"]}, 422, "task=['a']"),
    (zero_shot(GOOD, hypothesis="{}"), 422, "'hypothesis'"),
    (zero_shot(GOOD, labels=[]), 422, "1 to 1000"),
    (zero_shot(GOOD, labels=["a"] * 1001), 422, "1001"),
    (zero_shot(GOOD, labels=["a", " "]), 422, "' '"),
    (zero_shot(GOOD, labels=["a", 1]), 422, "label 1"),
    (zero_shot(GOOD, labels=["a", "b", "a"]), 422, "'a' is given twice"),
    (zero_shot(GOOD, labels=["Fox", "a", "fox"]), 422, "'Fox' and 'fox' are one text"),
    (zero_shot(GOOD, labels=["狐", "狗"]), 422, "'狐' and '狗' are one text"),
    (zero_shot(GOOD, labels=["a", "\ud800"]), 422, "UTF-8"),
    (zero_shot(GOOD, labels=["a", "b" * 600_000]), 413, "limit of 500000"),
    (zero_shot(GOOD, labels=[f"{n}" for n in range(1000)], hypothesis_template="x" * 999 + "{}"), 413, "limit of"),
    ({"inputs": GOOD, "parameters": {"candidate_labels": "a,,b"}}, 422, "''"),
    ({"inputs": GOOD, "parameters": {"candidate_labels": 3}}, 422, "label: 3"),
    (zero_shot(GOOD, hypothesis_template="a photo"), 422, "must hold {} once"),
    (zero_shot(GOOD, hypothesis_template="{} {}"), 422, "must hold {} once"),
    (zero_shot(GOOD, hypothesis_template=["{}"]), 422, "must hold {} once"),
    (zero_shot(GOOD, hypothesis_template="\ud800{}"), 422, "UTF-8"),
    (zero_shot([GOOD] * 33), 422, "33 images"),
    (zero_shot([]), 422, "0 images"),
    (zero_shot(None), 422, "no inputs"),
    (zero_shot(3), 422, "3 is not an image"),
    (zero_shot({"url": "x"}), 422, "None is not an image"),
    (zero_shot({"image": {"image": "x"}}), 422, "is not an image"),
    (zero_shot(b""), 422, "is empty (zero bytes)"),
    (
        zero_shot(encoded(make_image(), "TIFF")),
        422,
        "read here: JPEG, PNG, WEBP, GIF, BMP.",
    ),  # a tile of one may unpack to gigabytes
    (zero_shot(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"), 422, "is not an image"),
    (zero_shot(GOOD[:-200]), 422, "truncated"),
    (zero_shot(encoded(make_image(), "JPEG")[:-200]), 422, "truncated"),
    (zero_shot("no base64!"), 422, "neither an image's base64 nor"),
    (zero_shot("data:image/png,abc"), 422, "not in base64"),
    (zero_shot("https://example.org/cat.png"), 422, "not fetched"),
    (zero_shot("http://127.0.0.1/cat.png"), 422, "not fetched"),
    (zero_shot("file:///etc/passwd"), 422, "neither an image's base64 nor"),
    (zero_shot(encoded(Image.new("L", (2, 202)))), 422, "longer than 1:100"),
    (zero_shot(encoded_bomb(7100)), 413, "50.4 megapixels, over the limit of 50"),
    (zero_shot([encoded_bomb(4000)] * 4), 413, "64.0 megapixels are over"),
    (zero_shot(encoded_bomb(14000)), 413, "196.0 megapixels, over the limit of 50"),
    ({"inputs": ["a", ""]}, 422, "text ''"),
    ({"inputs": ["many words " * 30] * 400}, 413, "25600 tokens, over the limit of 20000"),
    ({"inputs": []}, 422, "1 to 1000"),
    ({"inputs": 3}, 422, "text 3"),
    ({"inputs": "a", "normalize": "yes"}, 422, "normalize='yes'"),
    ({"inputs": "a", "truncate_dim": 0}, 422, "use 1 to 16"),
    ({"inputs": "a", "truncate_dim": True}, 422, "use 1 to 16"),
    ({"inputs": "a", "dimensions": 17}, 422, "use 1 to 16"),
    ({"inputs": "a", "truncate": False}, 422, "truncate=False"),
    ({"inputs": "a", "encoding_format": "base64"}, 422, "encoding_format='base64'"),
    ({"inputs": "a", "prompt_name": "query"}, 422, "'prompt_name'"),
]


class TestRefused:
    @pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
    @pytest.mark.parametrize(("request_", "status", "words"), REFUSED, ids=[words for *_, words in REFUSED])
    def test_requests(self, handler, request_, status, words):
        with pytest.raises(RequestError) as caught:
            handler(request_)
        assert words in str(caught.value)
        assert caught.value.status == status
        assert len(str(caught.value)) < 400

    def test_images_of_very_many_bytes(self, monkeypatch):
        monkeypatch.setattr(handler_module, "MAX_IMAGE_BYTES", len(GOOD) - 1)
        with pytest.raises(RequestError, match="over the limit") as caught:
            read_content(GOOD)
        assert caught.value.status == 413

    def test_a_path_is_not_opened(self, handler, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "abcd").write_bytes(GOOD)  # a name that is base64 too
        for path in ("abcd", str(tmp_path / "abcd")):
            with pytest.raises(RequestError):
                handler(zero_shot(path))

    def test_damaged_weights_are_no_fault_of_the_client(self, tiny_model, tiny_processor):
        torch.nn.init.constant_(tiny_model.text_projection.weight, float("nan"))
        for request in (zero_shot(GOOD), {"inputs": "a"}):
            with pytest.raises(ValueError, match="weights are damaged") as caught:
                RequestHandler(tiny_model)(request)
            assert not isinstance(caught.value, RequestError)


DEPLOYMENT = """
import importlib.util
folder, image = sys.argv[1:]
spec = importlib.util.spec_from_file_location("handler", folder + "/handler.py")  # as Inference Endpoints do
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
answer = module.EndpointHandler(folder)
labels = ["a red square", "a blue disc", "nothing at all"]
request = {"inputs": open(image, "rb").read(), "parameters": {"candidate_labels": labels}}
answers = [answer(request), answer({"inputs": "a"})]
events = []
def note(name, arguments):
    # Older versions of huggingface_hub make a dataclass at each use of an image processor.
    if name not in ("compile", "exec") or sys._getframe(1).f_globals.get("__name__") != "dataclasses":
        events.append(name)
sys.addaudithook(note)
answer(request)
for inputs in (image, "file://" + image, "http://127.0.0.1:9/", "data:," + image, "__import__('os')"):
    try:
        answer({"inputs": inputs, "parameters": {"candidate_labels": ["{0.__class__}", inputs]}})
    except ValueError:
        answer({"inputs": [inputs, image]})
    else:
        raise SystemExit("an image was found at " + inputs)
watched = ("open", "socket", "subprocess", "os", "exec", "compile")
print(json.dumps([*answers, sorted({name for name in events if name.split(".")[0] in watched})]))
"""


class TestEndpointHandler:
    def test_in_a_published_folder_of_the_hubs_cache(self, handler, tiny_folder, tmp_path):
        blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
        shutil.copytree(tiny_folder, blobs)
        shutil.copy(handler_module.__file__, blobs / "handler.py")
        snapshot.mkdir()
        for file in blobs.iterdir():
            (snapshot / file.name).symlink_to(file)
        (tmp_path / "image.png").write_bytes(GOOD)
        done = run_as_stranger(DEPLOYMENT, tmp_path, snapshot, tmp_path / "image.png")
        scores, vector, events = json.loads(done.stdout.splitlines()[-1])
        assert_same(scores, handler({"inputs": GOOD, "parameters": {"candidate_labels": LABELS}}))
        assert vector == pytest.approx(handler({"inputs": "a"}), abs=1e-6)
        assert events == []  # it opened, started and connected to nothing for a request

    def test_runs_no_other_folders_code(self, tiny_folder, tmp_path):
        (tmp_path / "handler.py").write_text("raise SystemExit")
        for folder in (tiny_folder, tmp_path, "", "org/name"):
            with pytest.raises(ValueError, match="loads no other"):
                EndpointHandler(str(folder))

    def test_needs_nothing_of_clipmini(self):
        tree = ast.parse(Path(handler_module.__file__).read_text(encoding="utf-8"))
        modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        modules |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        third_party = {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)
        assert third_party == {"torch", "transformers", "PIL"}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_model_on_a_gpu_answers_as_one_on_the_cpu(tiny_folder):
    requests = [{"inputs": make_image(), "parameters": {"candidate_labels": LABELS}}, {"inputs": "a red square"}]
    on_cpu, on_gpu = (RequestHandler(load_model(tiny_folder, device)) for device in ("cpu", "cuda"))
    scores = [{item["label"]: item["score"] for item in handler(requests[0])} for handler in (on_gpu, on_cpu)]
    assert scores[0] == pytest.approx(scores[1], abs=1e-3)
    assert on_gpu(requests[1]) == pytest.approx(on_cpu(requests[1]), abs=1e-3)
