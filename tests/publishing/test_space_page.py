"""The page of a Space in a real browser: it computes what Python computes, and runs no library but the pinned ones."""

import base64
import json
import random
import re
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import DistilBertTokenizer

import clipmini
from browser import CHROMIUM, open_browser
from clipmini.publishing.push import prepare_push
from clipmini.publishing.space import prepare_space
from clipmini.training.build import character_tokenizer
from modeling_clipmini import ClipMiniModel, ClipMiniProcessor
from modeling_clipmini.images_clipmini import read_image

ROOT = Path(__file__).parents[2]
PHOTOS = ROOT / "examples" / "photos"
FLICKR = ROOT.parent / "shared" / "data" / "flickr8k" / "validation.parquet"
SITE = "https://space.test/"
CDN = re.compile(r"https://cdn\.jsdelivr\.net/npm/(?P<package>@?[^@\"]+@[\d.]+)/(?P<path>[^\"]+)")
IS_LOADED = "document.getElementById('progress').hidden"
STATUS = "document.getElementById('status').textContent"
PIXELS, VECTOR = "toPixelValues(image, model.processor)", "await model.embedImage(image)"
# ruff: noqa: RUF001
ODD_TEXTS = [
    *(
        "",
        "   ",
        "Ünïcödé naïve café",
        "日本語の犬",
        "🐶🐱 a dog 👨‍👩‍👧‍👦",
        "a\tb\nc  d",
        "[CLS] hi [SEP] [MASK]",
        "Straße İstanbul",
    ),
    *(
        "don't won't",
        "a" * 500,
        "word " * 700,
        "zero\u200bwidth\u00a0\u0000\ufffd",
        "1,234.56 $ €",
        "Привет мир",
        "한국어",
    ),
    *("العربية", "e\u0301", "ﬁ ½ ²", "a-b_c/d\\e<f>{g}|h~`", "𝒜𝓃", "．，！", "ß ẞ ı", "##ing playing##"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM or not shutil.which("npm"), reason="needs chromium and npm"),
]


def captions():
    """Give more than a thousand texts of every kind."""
    chance = random.Random(0)
    lines = [line for file in PHOTOS.glob("*/metadata.jsonl") for line in file.read_text("utf-8").splitlines()]
    texts = [json.loads(line)["caption"] for line in lines]
    if FLICKR.exists():
        texts += [text for row in pq.read_table(FLICKR)["captions"].to_pylist()[:200] for text in row]
    words = [word for text in texts for word in text.split()]
    letters = [
        *range(32, 127),
        *range(160, 0x250),
        *range(0x370, 0x600),
        *range(0x4E00, 0x4E80),
        *range(0x1F300, 0x1F400),
    ]
    texts += ["".join(map(chr, chance.choices(letters, k=chance.randrange(1, 60)))) for _ in range(600)]
    texts += [" ".join(chance.choices(words, k=chance.randrange(1, 150))) for _ in range(400)]
    return [*texts, *ODD_TEXTS]


def word_tokenizer():
    """Make a tokenizer of letters and of some words and endings."""
    pieces = [
        *character_tokenizer().get_vocab(),
        "a",
        "dog",
        "fish",
        "cat",
        "photo",
        "##ing",
        "##s",
        "犬",
        "##ed",
        "🐶",
    ]
    return DistilBertTokenizer(vocab={piece: index for index, piece in enumerate(dict.fromkeys(pieces))})


@pytest.fixture(scope="module")
def folder(tiny_config, tmp_path_factory):
    """A random model with its graphs and a card."""
    folder = tmp_path_factory.mktemp("page") / "model"
    tokenizer = word_tokenizer()
    config = tiny_config()
    config.text_config.vocab_size = len(tokenizer)
    torch.manual_seed(0)
    model = ClipMiniModel(config)
    torch.nn.init.normal_(model.visual_projection.weight)
    model.save_pretrained(folder)
    ClipMiniProcessor.from_towers(config, tokenizer).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    clipmini.export(folder)
    return folder


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """What the page loads from the CDN, by address, from npm itself."""
    folder, files = tmp_path_factory.mktemp("npm"), {}
    page = (ROOT / "clipmini" / "publishing" / "space" / "index.html").read_text("utf-8")
    for match in CDN.finditer(page):
        packed = subprocess.run(
            ["npm", "pack", "--silent", match["package"]], cwd=folder, capture_output=True, text=True
        )
        assert "E404" not in packed.stderr  # the page names what does not exist
        if packed.returncode:
            pytest.skip(f"npm cannot be reached: {packed.stderr[-200:]}")
        with tarfile.open(folder / packed.stdout.strip()) as archive:
            files[match[0]] = archive.extractfile(f"package/{match['path']}").read()
    assert len(files) == 3
    return files


@pytest.fixture(scope="module")
def site(folder, tmp_path_factory):
    """The files of the Space, by address."""
    cat = tmp_path_factory.mktemp("example") / "cat.webp"
    shutil.copy(PHOTOS / "test" / "explore_farm_animals_animals_cat.webp", cat)
    prepared = prepare_space(prepare_push(folder, "org/page", examples=[(cat, ["a cat", "a dog"])]), folder)
    read = {path: file if isinstance(file, bytes) else file.read_bytes() for path, file in prepared.files.items()}
    return {**{SITE + path: content for path, content in read.items()}, SITE: read["index.html"]}


@pytest.fixture
def browser(site, libraries, tmp_path):
    with open_browser(tmp_path / "profile") as browser:
        browser.files = {**site, **libraries}
        yield browser


def load_in(browser):
    """Open the page, and load its model once more, as `model`, for scripts of the test."""
    browser.open(SITE)
    browser.wait(IS_LOADED)
    settings, wasm = "JSON.parse(document.getElementById('settings').textContent)", "document.getElementById('wasm')"
    load = f"page = await import('./clipmini.js'); model = await page.Model.load({settings}, {wasm}, () => {{}})"
    browser.evaluate(f"var page, model; (async () => {{ {load} }})()")


def run_on(browser, file, what):
    """Give what the page makes of an image file, as an array."""
    uri = f"data:application/octet-stream;base64,{base64.b64encode(file.read_bytes()).decode()}"
    image = f"const image = await page.readImage(await (await fetch('{uri}')).blob())"
    return np.array(browser.evaluate(f"(async () => {{ {image}; return Array.from({what}) }})()"), dtype=np.float32)


def image_files(folder):
    """Write images of every kind."""
    cat = Image.open(PHOTOS / "test" / "explore_farm_animals_animals_cat.webp").convert("RGB")
    turned = cat.getexif()
    turned[0x112] = 6
    cat.save(folder / "turned.jpg", exif=turned)
    cat.resize((2001, 1333)).save(folder / "large.jpg", quality=95)
    clear = cat.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(cat.size))
    clear.save(folder / "clear.png")
    Image.effect_noise((301, 97), 90).save(folder / "noise.png")
    return sorted(folder.iterdir())


def test_pixels_and_embeddings_are_those_of_python(browser, folder, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    load_in(browser)
    graph = onnxruntime.InferenceSession(folder / "onnx" / "vision_model.onnx")
    processor = clipmini.load(folder, device="cpu").processor
    levels = 255 * np.array(processor.image_processor.image_std)[:, None, None]
    for file in image_files(images):
        expected = processor(images=read_image(file))["pixel_values"].numpy()
        pixels = run_on(browser, file, f"page.{PIXELS}").reshape(expected.shape)
        assert np.abs((pixels - expected) * levels).max() < 2.5, file.name
        (on_same_pixels,) = graph.run(None, {"pixel_values": pixels})
        embeds = run_on(browser, file, VECTOR)
        np.testing.assert_allclose(embeds, on_same_pixels[0], atol=1e-3)


def test_ids_are_those_of_python(browser, folder):
    texts = captions()
    assert len(texts) > 1000
    load_in(browser)
    tokenizer = clipmini.load(folder, device="cpu").processor.tokenizer
    expected = tokenizer(texts, truncation=True)["input_ids"]
    assert max(map(len, expected)) == tokenizer.model_max_length
    assert browser.evaluate(f"{json.dumps(texts)}.map(text => model.tokenize(text))") == expected


def test_a_photograph_is_labeled_as_by_classify(browser, folder, tmp_path):
    file = next(file for file in image_files(tmp_path) if file.name == "turned.jpg")
    labels = ["a cat", "a dog", "people at a table", "ein Fisch"]
    (expected,) = clipmini.classify(folder, [file], labels)
    assert expected.scores[0].score > expected.scores[1].score + 0.01
    browser.open(SITE)
    browser.choose("#file", file)  # before the model is there
    browser.type("#labels", "a cat, a dog,, \npeople at a table\nein Fisch,a cat")
    browser.wait("document.querySelectorAll('#answer li').length == 4")
    rows = browser.evaluate("[...document.querySelectorAll('#answer li')].map(row => row.innerText.split(/\\n+/))")
    assert [label for label, _ in rows] == [item.label for item in expected.scores]
    shown = [float(share.removesuffix(" %")) / 100 for _, share in rows]
    np.testing.assert_allclose(shown, [item.score for item in expected.scores], atol=0.003)
    assert browser.evaluate(STATUS) == f"“{expected.label}” fits best of these 4 labels."
    known = {*browser.files, SITE + "favicon.ico"}
    assert set(browser.asked) <= known | {address for address in browser.asked if address.startswith("blob:")}


def test_examples_and_errors(browser, tmp_path):
    browser.open(SITE)
    browser.wait(IS_LOADED)
    browser.evaluate("document.querySelector('#examples button').click()")
    browser.wait("document.querySelectorAll('#answer li').length == 2")
    broken = tmp_path / "broken.jpg"
    broken.write_text("no image")
    browser.choose("#file", broken)
    browser.wait("document.querySelector('.error')")
    assert browser.evaluate(STATUS).startswith("Your browser cannot read broken.jpg as an image.")
    assert browser.evaluate("document.querySelectorAll('#answer li').length") == 0
    browser.type("#labels", ", A Cat")
    browser.choose("#file", PHOTOS / "test" / "solar_system_sun.webp")
    browser.wait(f"{STATUS}.endsWith('are one text to the model; leave one out.')")


@pytest.mark.parametrize("number", range(3))
def test_a_library_that_was_tampered_with_does_not_run(browser, libraries, number):
    address = list(libraries)[number]
    browser.files[address] = libraries[address] + b"\n"
    browser.open(SITE)
    browser.wait("document.querySelector('.error')")
    assert browser.evaluate(STATUS).startswith("The model could not be loaded (")
