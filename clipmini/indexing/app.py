"""A page in which people search an index and label images, in a browser: nothing leaves this machine.

Gradio draws it. What a visitor can name is only words, uploads and hits that were shown: no path, and no address.
"""

import html
import json
import os
import socket
import tempfile
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import gradio as gr
from fastapi import FastAPI
from gradio.utils import get_upload_folder
from PIL import Image
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

from clipmini.inference.embed import DualEncoder
from clipmini.inference.prompts import describe_unreadable, fill_template, is_image, split_labels
from clipmini.inference.saliency import compare_places, draw_places, find_crop
from clipmini.inference.search import NORMALIZED, Hit, Hits
from clipmini.inference.server import run
from clipmini.inference.zero_shot import classify
from modeling_clipmini import ClipMiniModel
from modeling_clipmini.handler import DEFAULT_TEMPLATE
from modeling_clipmini.images_clipmini import ImageError, open_image, read_image, read_named

if TYPE_CHECKING:
    from .index import Index

MAX_UPLOAD_MIB = 16
MAX_CHARACTERS = 1000  # of a text that is typed
MAX_HITS = 60
MAX_WAITING = 32  # requests, while one is worked on
THUMBNAIL_EDGE, IMAGE_EDGE = 320, 1024  # pixels: originals are never sent
SWEEP_S, KEPT_S = 600, 3600  # how often files that were sent or uploaded are removed, and how old they are by then
# Browsers then fetch nothing from elsewhere, whatever the page names.
POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
UPLOAD: dict[str, Any] = {"sources": ["upload", "clipboard"], "buttons": [], "format": "jpeg"}
SHOWN: dict[str, Any] = {"show_label": False, "interactive": False, "buttons": [], "format": "jpeg"}
PRIVATE: dict[str, Any] = {"api_visibility": "private"}
HEADING = "<h1>clipmini: {}</h1>"
HOW_TO_SEARCH = """To search on this page too, name a folder of images or an index of them:
<pre>clipmini app {} --index FOLDER</pre>"""
WHERE = "For example: width > 1000 and date >= '2024-01-01'"
CSS = """
.gradio-container {width: 100% !important; max-width: 1200px !important; margin: 0 auto !important}
h1 {font-size: 1.1rem; font-weight: 600; overflow-wrap: anywhere}
.message, .error {color: var(--body-text-color); overflow-wrap: anywhere; text-wrap: pretty}
.error {padding: 10px 14px; border-left: 4px solid #b45309; background: #fef3c7; color: #451a03}
.grid-wrap {max-height: none !important}
.grid-container {grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)) !important}
.caption-label {left: 0 !important; right: 0 !important; bottom: 0 !important; max-width: none !important}
.shown img {width: 100%; height: 100%; object-fit: contain}
:is(button, input, textarea, label):focus-visible {outline: 3px solid #2563eb !important; outline-offset: 1px}
pre {overflow-x: auto; padding: 8px 0}
@media (max-width: 700px) {#detail {order: -1}}
"""
SHOW = "() => document.getElementById('{}').scrollIntoView({{block: 'nearest', behavior: 'smooth'}})"


class Page:
    """What the page does, without its looks.

    Args:
        encoder: the model.
        index: what is searched; None for a page that only labels images.
    """

    def __init__(self, encoder: DualEncoder, index: "Index | None" = None) -> None:
        self.encoder, self.index = encoder, index
        self.has_map = isinstance(encoder.model, ClipMiniModel)
        self._lock = threading.Lock()  # one search uses all cores, and tokenizers are not for several threads

    def search(
        self,
        words: Any,
        image: Image.Image | None = None,
        plus: Any = "",
        minus: Any = "",
        where: Any = "",
        top: int = 24,
        collapse: bool = True,
    ) -> Hits:
        """Search for what was typed and dropped; `Index.search` says what the arguments mean.

        Args:
            words: what the images should show.
            image: an image to find more like it; with words, it is added to them.
            plus: more words to add.
            minus: words to subtract.
            where: a condition.
            top: how many images to find; of more than `MAX_HITS`, as many.
            collapse: whether to leave out near-copies.

        Raises:
            ValueError: there is nothing to search for, a text is not allowed, or `Index.search` raises it.
        """
        assert self.index is not None
        terms = [term for term in (check_words(words), image, check_words(plus)) if term]
        if not terms:
            raise ValueError("There is nothing to search for; write what the images should show, or drop an image.")
        subtracted = [term for term in [check_words(minus)] if term]
        condition = check_words(where) or None
        query, *added = terms
        with self._lock:
            (hits,) = self.index.search(
                query, top=min(top, MAX_HITS), plus=added, minus=subtracted, where=condition, collapse=collapse
            )
        return hits

    def label(self, image: Image.Image | None, labels: Any) -> dict[str, float]:
        """Return the probability of each label, of which commas separate the next, for an image.

        Raises:
            ValueError: there is no image or no label, or `classify` raises it.
        """
        names = [name for label in split_labels(check_words(labels)) if (name := check_words(label))]
        if image is None or not names:
            raise ValueError("Drop an image, and write at least one label; separate labels by commas.")
        with self._lock:
            (classified,) = classify(self.encoder, [image], names, [DEFAULT_TEMPLATE])
        return {item.label: item.score for item in classified.scores}

    def doubt(self, *typed: Any) -> str:
        """Return a sentence to append on what was typed, if the model cannot read some of it, or ""."""
        with self._lock:
            doubt = describe_unreadable(self.encoder.tokenizer, list(filter(None, map(check_words, typed))), "texts")
        return f" But {doubt}" if doubt else ""

    def draw_map(self, image: Any, text: str) -> tuple[Image.Image, str]:
        """Draw where the model looked for a text in what `read_image` takes, and say what the colors mean.

        Raises:
            ValueError: the image cannot be read, or the model has no map.
        """
        whole = read_named(image, "the image")
        with self._lock:
            similarities = compare_places(self.encoder, whole, self.encoder.encode_texts([text])[0])
        whole.thumbnail((IMAGE_EDGE, IMAGE_EDGE))
        processor: Any = self.encoder.model.processor
        crop = find_crop(processor.image_processor, *whole.size)
        high, low = similarities.max(), similarities.min()
        meaning = f"Bright where the image is most like “{text}” (cosine {high:z.2f}), dark where least ({low:z.2f})."
        if max(crop[:2]) > 0.5:
            meaning += " The margins in the shade are cut off before the model sees them."
        return draw_places(whole, similarities, crop), meaning


def check_words(text: Any) -> str:
    """Return a typed text without white space around it, "" for None.

    Raises:
        ValueError: it is too long, or names a file: `image:PATH` is for the command line, whose user owns all files.
    """
    text = str(text or "").strip()
    if is_image(text.lower()):
        raise ValueError(f"{text!r} names a file, and this page takes words; drop the image instead.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"A text of {len(text)} characters is too long; write at most {MAX_CHARACTERS}.")
    return text


def open_upload(file: Any) -> Image.Image | None:
    """Open an image that was dropped, or return None if none was.

    Args:
        file: what a browser sends: a mapping with the `path` that Gradio gave the upload.

    Raises:
        ValueError: it is no upload, whatever else a request may name instead, or cannot be read.
    """
    if not file:
        return None
    if not isinstance(file, dict) or not _is_upload(path := file.get("path")):
        raise ValueError("This is no dropped image; drop one.")
    try:
        return read_image(path)
    except ImageError as error:
        raise ValueError(f"The dropped file {error}; drop another image.") from None


class Actions:
    """What happens at each event of the page: Gradio's values in, its updates out; an error becomes one sentence.

    `found` is hits and the words that found them, `hit` one of them; both stay on the server, in `gr.State`.
    """

    def __init__(self, page: Page) -> None:
        self.page = page

    def search(self, words: Any, file: Any, *options: Any) -> tuple[Any, ...]:
        """Fill the grid."""
        none = None, None, gr.Column(visible=False), gr.Column(visible=False)
        try:
            hits = self.page.search(words, open_upload(file), *options)
        except (ValueError, OSError) as error:
            return _say(error), *none
        if not hits:
            return _say("No image meets the condition; change it, or leave it empty."), *none
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_thumbnail, hits))
        captioned = [(image, f"{hit.score:.3f} {hit.name}") for image, hit in zip(images, hits, strict=True)]
        message = f"{len(hits)} of {len(self.page.index or ()):,} images, the best first."
        if hits.scoring == NORMALIZED:
            message += " Where a score is above 0, the words fit the image better than captions do on average."
        message += self.page.doubt(words, *options[:2])
        gallery = gr.Gallery(captioned, selected_index=None)
        return _say(message), gallery, (hits, check_words(words)), gr.Column(visible=True), gr.Column(visible=False)

    def choose(self, found: tuple[Hits, str], with_map: bool, event: gr.SelectData) -> tuple[Any, ...]:
        """Show a hit that was clicked."""
        hit = found[0][event.index]
        return hit, gr.Column(visible=True), *self._show(found, hit, with_map)

    def switch(self, found: tuple[Hits, str], hit: Hit, event: gr.SelectData) -> tuple[Any, ...]:
        """Show the hit with or without its map."""
        return bool(event.selected), *self._show(found, hit, bool(event.selected))

    def _show(self, found: tuple[Hits, str], hit: Hit, with_map: bool) -> tuple[Any, str]:
        title = f"<b>{hit.score:.3f}</b> {html.escape(hit.name)}"
        try:
            if with_map and found[1]:
                drawn, meaning = self.page.draw_map(hit.image, found[1])
                return drawn, title + _say(meaning)
            return _shrink(hit.image, IMAGE_EDGE), title
        except (ValueError, OSError) as error:
            return None, title + _say(error)

    def take(self, hit: Hit) -> tuple[Any, ...]:
        """Put a hit where an image is dropped, in place of words."""
        try:
            return "", _shrink(hit.image, IMAGE_EDGE)
        except ImageError as error:
            raise gr.Error(html.escape(str(error)), print_exception=False) from None

    def label(self, file: Any, labels: Any) -> tuple[Any, ...]:
        """Show the probabilities of labels, and the map of the best."""
        try:
            probabilities = self.page.label(open_upload(file), labels)
        except (ValueError, OSError) as error:
            return gr.Label(visible=False), gr.Image(visible=False), _say(error)
        best = max(probabilities, key=lambda name: probabilities[name])
        drawn, meaning = self._look(file, best)
        doubt = self.page.doubt(*probabilities)
        return gr.Label(probabilities, visible=True), drawn, meaning + (_say(doubt) if doubt else "")

    def look(self, file: Any, event: gr.SelectData) -> tuple[Any, ...]:
        """Show the map of a label that was clicked."""
        return self._look(file, event.value)

    def _look(self, file: Any, label: Any) -> tuple[Any, str]:
        try:
            (text,) = fill_template([check_words(label)], DEFAULT_TEMPLATE)
            drawn, meaning = self.page.draw_map(open_upload(file), text)
        except (ValueError, OSError) as error:
            return gr.Image(visible=False), _say(str(error))
        return gr.Image(drawn, visible=True), _say(meaning)


def build_blocks(page: Page, model: str) -> gr.Blocks:
    """Lay the page out.

    What visitors send comes to `Actions` as it is (`preprocess=False`), so that images are opened by `open_upload`.

    Args:
        page: what it does.
        model: what people know the model by.
    """
    actions = Actions(page)
    with gr.Blocks(title="clipmini", analytics_enabled=False, delete_cache=(SWEEP_S, KEPT_S)) as blocks:
        gr.HTML(HEADING.format(html.escape(page.encoder.name)))
        if page.index is None:
            _add_labels(actions)
            gr.HTML(HOW_TO_SEARCH.format(html.escape(model)))
        else:
            with gr.Tab("Search"):
                _add_search(actions, len(page.index))
            with gr.Tab("Label an image"):
                _add_labels(actions)
    return blocks.queue(max_size=MAX_WAITING)


def _add_search(actions: Actions, num_images: int) -> None:
    has_map = actions.page.has_map
    found, hit, with_map = gr.State(), gr.State(), gr.State(has_map)
    with gr.Row():
        with gr.Column(scale=3):
            words = gr.Textbox(label="What should the images show?", placeholder="people making music", autofocus=True)
            with gr.Row():
                plus = gr.Textbox(label="More of", placeholder="at night", min_width=120)
                minus = gr.Textbox(label="Less of", placeholder="a crowd", min_width=120)
            go = gr.Button("Search", variant="primary")
        file = gr.Image(label="Or an image to find more like it", height=230, scale=1, min_width=260, **UPLOAD)
    with gr.Accordion("Filters", open=False), gr.Row():
        where = gr.Textbox(label="Condition in SQL", info=WHERE, scale=3)
        top = gr.Slider(1, MAX_HITS, 24, step=1, label="Number of images", scale=2)
        collapse = gr.Checkbox(True, label="Show one of near-copies", scale=1)
    status = gr.HTML(_say(f"{num_images:,} images can be searched."), elem_id="status")
    with gr.Row():
        with gr.Column(scale=3, min_width=300, visible=False) as results:
            gallery = gr.Gallery(allow_preview=False, object_fit="contain", height="auto", **SHOWN)
        with gr.Column(scale=2, min_width=300, visible=False, elem_id="detail") as detail:
            picture = gr.Image(height=360, elem_classes="shown", **SHOWN)
            about = gr.HTML()
            switch = gr.Checkbox(True, label="Show where the model looked", visible=has_map)
            more = gr.Button("More like this")

    search: dict[str, Any] = {
        "fn": actions.search,
        "inputs": [words, file, plus, minus, where, top, collapse],
        "outputs": [status, gallery, found, results, detail],
        "show_progress_on": status,
        "preprocess": False,
    }
    entered = [words.submit, plus.submit, minus.submit, where.submit, go.click, file.upload]
    gr.on(entered, **search, api_name="search").then(js=SHOW.format("status"))
    chosen = gallery.select(actions.choose, [found, with_map], [hit, detail, picture, about], **PRIVATE)
    chosen.then(js=SHOW.format("detail"))
    switch.select(actions.switch, [found, hit], [with_map, picture, about], **PRIVATE)
    taken = more.click(actions.take, hit, [words, file], **PRIVATE)
    taken.success(**search, **PRIVATE).then(js=SHOW.format("status"))


def _add_labels(actions: Actions) -> None:
    with gr.Row():
        with gr.Column(min_width=300):
            file = gr.Image(label="Image", height=300, **UPLOAD)
            labels = gr.Textbox(label="What may it show? Labels, separated by commas", placeholder="a cat, a dog")
            go = gr.Button("Label", variant="primary")
        with gr.Column(min_width=300):
            scores = gr.Label(label="Probability of each label", visible=False)
            picture = gr.Image(height=360, elem_classes="shown", visible=False, **SHOWN)
            status = gr.HTML(_say("Drop an image, and write what it may show."))
    options: dict[str, Any] = {"show_progress_on": status, "preprocess": False}
    outputs = [scores, picture, status]
    gr.on([go.click, labels.submit], actions.label, [file, labels], outputs, api_name="label", **options)
    scores.select(actions.look, file, [picture, status], **options, **PRIVATE)


def _thumbnail(hit: Hit) -> Image.Image:
    try:
        return _shrink(hit.image, THUMBNAIL_EDGE)
    except ImageError:  # gone or changed since it was indexed; the reason is shown once it is chosen
        return Image.new("RGB", (THUMBNAIL_EDGE, THUMBNAIL_EDGE), "#9ca3af")


def _shrink(image: Any, edge: int) -> Image.Image:
    """Open what `read_image` takes, at most `edge` pixels wide and high."""
    try:
        with open_image(image) as opened:
            is_jpeg = opened.format in ("JPEG", "MPO")
            if is_jpeg:
                opened.draft(None, (edge, edge))  # decoded at a fraction of its size, six times as fast
            small = read_image(opened if is_jpeg else image)
    except ImageError as error:
        raise ImageError(f"The image {error}.") from None
    small.thumbnail((edge, edge))
    return small


def _say(message: str | Exception) -> str:
    kind = 'class="error" role="alert"' if isinstance(message, Exception) else 'class="message" role="status"'
    return f"<p {kind}>{html.escape(str(message))}</p>"


def _is_upload(path: Any) -> bool:
    """Return whether a path lies where Gradio keeps what was uploaded to this page, or made by it."""
    return os.path.realpath(str(path)).startswith(os.path.realpath(get_upload_folder()) + os.sep)


def _names_other_file(value: Any) -> bool:
    """Return whether what a request holds names a file, as Gradio's browser code does, that is no upload."""
    if isinstance(value, dict):
        if value.get("path") is not None and not _is_upload(value["path"]):
            return True
        value = list(value.values())
    return isinstance(value, list) and any(map(_names_other_file, value))


async def guard(request: Request, call_next: Any) -> Response:
    """Answer a request unless it is large, or makes Gradio fetch an address or copy a file of this machine."""
    path, headers = request.url.path, request.headers
    if "transfer-encoding" in headers or int(headers.get("content-length", 0)) > MAX_UPLOAD_MIB * 2**20:
        return PlainTextResponse(f"Send at most {MAX_UPLOAD_MIB} MiB, and say how many.", 413)
    if not path.endswith("/upload"):
        try:
            body = json.loads(await request.body() or "{}")
        except (ValueError, RecursionError):
            return PlainTextResponse("The body is not JSON.", 400)
        if "=http" in path or _names_other_file(body):
            return PlainTextResponse("Only uploads can be named.", 403)
    response = await call_next(request)
    response.headers["content-security-policy"] = POLICY
    return response


def create_app(page: Page, model: str) -> FastAPI:
    """Create the ASGI app of a page.

    Args:
        page: what it does.
        model: what people know the model by.
    """
    app = FastAPI(openapi_url=None)
    app.middleware("http")(guard)
    return gr.mount_gradio_app(
        app,
        build_blocks(page, model),
        path="/",
        css=CSS,
        theme=gr.themes.Default(primary_hue="blue", font=["system-ui", "sans-serif"], font_mono=["monospace"]),
        max_file_size=MAX_UPLOAD_MIB * 2**20,
        show_error=False,
        footer_links=[],
        run_history=False,
    )


def serve(page: Page, model: str, sock: socket.socket) -> None:
    """Serve a page until Ctrl-C; files that were uploaded or sent are removed at the latest then.

    Args:
        page: what it does.
        model: what people know the model by.
        sock: from `clipmini.inference.server.bind`.
    """
    with tempfile.TemporaryDirectory(prefix="clipmini-app-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # which Gradio knows by no other way
        app = create_app(page, model)
        pages: Any = app.routes[-1]
        run(app, sock, on_stop=lambda: pages.app.stop_event.set())  # each page that is open holds a connection
