"""What the uploaded code must not do, and what it must not load."""

import ast
import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModel

import modeling_clipmini
from modeling_clipmini import ClipMiniModel, ClipMiniTextModel, ClipMiniVisionModel
from stranger import run_as_stranger

UPLOADED = sorted(Path(modeling_clipmini.__file__).parent.glob("*_clipmini.py"))
FORBIDDEN_MODULES = set(
    "asyncio ctypes ftplib http httpx huggingface_hub importlib io marshal multiprocessing pathlib pickle requests "
    "runpy shelve shutil smtplib socket ssl subprocess sys tempfile urllib webbrowser zipfile".split()
)
# The one file that opens images, of paths and addresses that a caller gives, and passes bytes on in memory.
OF_THE_OPENER = {"io", "open", "socket", "urllib", "os.SEEK_END"}
FORBIDDEN_NAMES = {"open", "eval", "exec", "compile", "__import__", "input", "globals", "breakpoint"}
FORBIDDEN_ATTRIBUTES = {"open", "system", "popen", "write", "write_text", "write_bytes", "read_text", "read_bytes"}


def uses(tree):
    """Imported modules, names, attributes (those of torch and os with their owner) and keywords of a file."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (("module", alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "module", (node.module or "").split(".")[0] if not node.level else "."
            yield from (("name", alias.name) for alias in node.names)
        elif isinstance(node, ast.Name):
            yield "name", node.id
        elif isinstance(node, ast.Attribute):
            yield "attribute", node.attr
            if isinstance(node.value, ast.Name) and node.value.id in ("torch", "os"):
                yield "attribute", f"{node.value.id}.{node.attr}"
        elif isinstance(node, (ast.keyword, ast.arg)):
            yield "name", node.arg


def faults(source):
    forbidden = {
        "module": FORBIDDEN_MODULES,
        "name": FORBIDDEN_NAMES | {"trust_remote_code"},
        "attribute": FORBIDDEN_ATTRIBUTES | {"torch.load", "torch.save", "torch.hub"},
    }
    allowed_of_os = {"os.PathLike", "os.fspath", "os.path"}
    for kind, name in uses(ast.parse(source)):
        if name in forbidden[kind] or (str(name).startswith("os.") and name not in allowed_of_os):
            yield name


@pytest.mark.parametrize("path", UPLOADED, ids=lambda path: path.name)
def test_uploaded_code_reads_writes_and_connects_nowhere(path):
    allowed = OF_THE_OPENER if path.name == "images_clipmini.py" else set()
    assert set(faults(path.read_text(encoding="utf-8"))) == allowed


def test_the_search_finds_what_it_is_for():
    source = "import socket\nfrom PIL import Image\nImage.open(x)\nopen(x)\nm.eval()\ntorch.load(x)\nos.remove(x)\n"
    source += "f(trust_remote_code=True)\nfrom urllib.request import urlopen\neval(x)\nimage.load()\n"
    expected = ["eval", "open", "open", "os.remove", "socket", "torch.load", "trust_remote_code", "urllib"]
    assert sorted(faults(source)) == expected


AUDIT = """
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor
folder, image = sys.argv[1], Image.open(sys.argv[2]).convert("RGB")
events = []
def is_uploaded(frame):
    return "transformers_modules" in frame.f_code.co_filename
def hook(event, arguments):
    if event.startswith(("socket.", "subprocess.", "os.system", "urllib.")):
        events.append([event, str(arguments)])
    elif event.startswith(("open", "os.")) and event not in ("os.listdir", "os.scandir"):
        frame = sys._getframe(1)
        if is_uploaded(frame):
            events.append([event, str(arguments[0])])
        if is_closed:
            events.append([event, f"{arguments[0]} by {frame.f_code.co_filename}"])
is_closed = False
sys.addaudithook(hook)
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
assert is_uploaded(type("", (), {"f_code": type(model).forward.__wrapped__.__code__}))
def use():
    model(**processor(images=[image], text=["a"])).loss.backward()
    model.encode_image([image, image])
    model.encode_text(["a", "b"], show_progress_bar=True)
use()  # whatever is imported late is imported now
is_closed = True
use()
print(json.dumps(events))
"""


@pytest.fixture
def image(tmp_path):
    Image.linear_gradient("L").save(tmp_path / "image.png")
    return tmp_path / "image.png"


def test_an_audit_hook_sees_no_connection_and_no_file(tiny_folder, image, tmp_path):
    """Nobody connects; the uploaded code opens nothing at all; and once all is loaded, nobody opens anything."""
    output = run_as_stranger(AUDIT, tmp_path, tiny_folder, image).stdout
    assert json.loads(output.splitlines()[-1]) == []


@pytest.mark.slow
def test_the_audit_hook_sees_what_it_is_for(tiny_folder, image, tmp_path):
    doctored = tmp_path / "doctored"
    shutil.copytree(tiny_folder, doctored)
    code = (doctored / "loss_clipmini.py").read_text(encoding="utf-8")
    added = "\nimport socket\nopen(__file__).close()\nsocket.socket().close()\n"
    (doctored / "loss_clipmini.py").write_text(code + added)
    output = run_as_stranger(AUDIT, tmp_path, doctored, image).stdout
    assert {event for event, _ in json.loads(output.splitlines()[-1])} == {"open", "socket.__new__"}


class Bomb:
    """Unpickled, it leaves a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.fixture
def pickled_folder(tiny_folder, tmp_path):
    """A model folder whose weights are a pickle that does something else too."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_folder, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({"bomb": Bomb(tmp_path / "mark")}, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("loader", [ClipMiniModel, ClipMiniVisionModel, ClipMiniTextModel, AutoModel])
@pytest.mark.parametrize("options", [{}, {"weights_only": False}, {"use_safetensors": False}])
def test_pickled_weights_are_refused(loader, options, pickled_folder, tmp_path):
    with pytest.raises(ValueError, match="Only safetensors weights are loaded, because pickled weights can run code"):
        loader.from_pretrained(pickled_folder, **options)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_by_other_ways_are_refused(pickled_folder, tiny_folder, tmp_path):
    """An index of shards, and a file that the config names."""
    weights = pickled_folder / "pytorch_model.bin"
    config = ClipMiniModel.config_class.from_pretrained(tiny_folder)
    names = ClipMiniModel(config).state_dict()
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(names, weights.name)}
    (pickled_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file"):
        ClipMiniModel.from_pretrained(pickled_folder, dtype=torch.float32)
    (pickled_folder / "model.safetensors.index.json").unlink()
    weights.rename(pickled_folder / "adapter_model.bin")
    values = json.loads((pickled_folder / "config.json").read_text())
    (pickled_folder / "config.json").write_text(json.dumps({**values, "transformers_weights": "adapter_model.bin"}))
    with pytest.raises(ValueError, match=r"adapter_model\.bin is not a safetensors file"):
        ClipMiniModel.from_pretrained(pickled_folder, dtype=torch.float32)
    assert not (tmp_path / "mark").exists()


def test_pickled_weights_of_a_hub_id_are_refused(pickled_folder, tmp_path):
    """As the Hub's cache holds a repository without safetensors."""
    repository, commit = tmp_path / "cache" / "models--org--pickled", "a" * 40
    shutil.copytree(pickled_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    for name in ("model.safetensors", "model.safetensors.index.json"):
        (repository / ".no_exist" / commit).mkdir(parents=True, exist_ok=True)
        (repository / ".no_exist" / commit / name).touch()
    with pytest.raises(
        ValueError, match=r"org/pickled has no model\.safetensors, or .*\. Only safetensors weights are loaded"
    ):
        ClipMiniModel.from_pretrained("org/pickled", cache_dir=tmp_path / "cache")


def test_pickled_towers_are_refused(tiny_model, tmp_path):
    vision, text = tmp_path / "vision", tmp_path / "text"
    tiny_model.vision_model.save_pretrained(vision)
    tiny_model.text_model.save_pretrained(text)
    (text / "model.safetensors").unlink()
    (text / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(tmp_path / "mark")))
    with pytest.raises(ValueError, match=r"text has no model\.safetensors\. Only safetensors weights are loaded"):
        ClipMiniModel.from_vision_text_pretrained(str(vision), str(text))
    index = {"metadata": {}, "weight_map": {"embeddings.word_embeddings.weight": "pytorch_model.bin"}}
    (text / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a safetensors file"):
        ClipMiniModel.from_vision_text_pretrained(str(vision), str(text))
    assert not (tmp_path / "mark").exists()


def test_an_old_transformers_is_told_what_to_do(tiny_folder, tmp_path):
    code = """
import transformers
transformers.__version__ = "4.57.3"
from transformers import AutoModel
AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
"""
    result = run_as_stranger(code, tmp_path, tiny_folder, check=False)
    assert 'need transformers 5.8 or newer, and 4.57.3 is installed: pip install --upgrade "transf' in result.stderr
