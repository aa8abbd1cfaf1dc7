"""A model's folder is data: no command runs its code, starts a process, opens a connection, or asks to."""

import json
import multiprocessing
import shutil
import sys

import pytest
import torch
from huggingface_hub import constants
from typer.testing import CliRunner

from clipmini.cli import app
from clipmini.inference.encoders import load_encoder
from clipmini.trust import refuse_code

EVIL = """
import pathlib
pathlib.Path({mark!r}).touch()
from transformers import PreTrainedTokenizerFast, CLIPImageProcessor
class Evil(PreTrainedTokenizerFast): pass
class EvilImages(CLIPImageProcessor): pass
"""


def change(file, **changes):
    """Set keys of a JSON file; two underscores lead into a nested dict."""

    def apply(folder):
        path = folder / file
        values = json.loads(path.read_text()) if path.exists() else {}
        for key, value in changes.items():
            *parents, last = key.split("__")
            target = values
            for parent in parents:
                target = target[parent]
            target[last] = value
        path.write_text(json.dumps(values))

    return apply


def modules(kind, path=""):
    return lambda folder: (folder / "modules.json").write_text(json.dumps([{"type": kind, "path": path}]))


# How a model's folder is changed, and the file, key and value that the message names.
KINDS = {
    "pickle for timm": (
        change("config.json", vision_config__model_args={"checkpoint_path": "evil.pth"}),
        ("config.json", "vision_config.model_args.checkpoint_path", "evil.pth"),
    ),
    "pickle for the side tower": (
        change("config.json", side_vision_config={"architecture": "resnet18", "model_args": {"checkpoint_path": "a"}}),
        ("config.json", "side_vision_config.model_args.checkpoint_path", "a"),
    ),
    "other configuration": (
        change("config.json", vision_config__architecture="local-dir:/evil"),
        ("config.json", "vision_config.architecture", "local-dir:/evil"),
    ),
    "module of its own": (modules("evil.Evil"), ("modules.json", "0.type", "evil.Evil")),
    "module elsewhere": (
        modules("sentence_transformers.models.Transformer", "../evil"),
        ("modules.json", "0.path", "../evil"),
    ),
    "tokenizer of its own": (
        change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]}),
        ("tokenizer_config.json", "auto_map", "evil.Evil"),
    ),
    "image processor of its own": (
        change("preprocessor_config.json", auto_map={"AutoImageProcessor": "evil.EvilImages"}),
        ("preprocessor_config.json", "auto_map", "evil.EvilImages"),
    ),
    "image processor within the processor": (
        change("processor_config.json", image_processor__auto_map={"AutoImageProcessor": "evil.EvilImages"}),
        ("processor_config.json", "image_processor.auto_map", "evil.EvilImages"),
    ),
    "code within the text tower": (
        change("config.json", text_config__auto_map={"AutoModel": "org/evil--evil.Evil"}),
        ("config.json", "text_config.auto_map", "org/evil--evil.Evil"),
    ),
    "other file in place of its configuration": (
        change("config.json", configuration_files=["config.4.0.0.json"]),
        ("config.json", "configuration_files", "config.4.0.0.json"),
    ),
    "backbone from elsewhere": (
        change("config.json", text_config={"model_type": "dpt", "backbone": "x", "use_pretrained_backbone": True}),
        ("config.json", "text_config.use_pretrained_backbone", "true"),
    ),
    "kernel": (
        change("config.json", text_config__attn_implementation="evil/kernel"),
        ("config.json", "text_config.attn_implementation", "evil/kernel"),
    ),
    "adapter of another model": (
        change("adapter_config.json", base_model_name_or_path="evil/base"),
        ("adapter_config.json", "base_model_name_or_path", "evil/base"),
    ),
}
COMMANDS = {
    "search": ["search", "BAD", "PHOTOS", "a dog"],
    "classify": ["classify", "BAD", "PHOTOS/0.png", "--labels", "a,b"],
    "evaluate": ["evaluate", "BAD", "PHOTOS", "--out", "OUT"],
    "baseline": ["evaluate", "GOOD", "PHOTOS", "--out", "OUT", "--baseline", "BAD"],
    "teach": ["teach", "BAD", "demo", "--set", "source=PHOTOS", "--out", "OUT.parquet"],
    "train": ["train", "demo", "--set", "source=PHOTOS", "--set", "model=BAD", "--set", "output_dir=OUT"],
    "serve": ["serve", "BAD", "--port", "0"],
    "push": ["push", "BAD", "me/it", "--dry-run"],
}
WATCHED = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.", "builtins.input", "pickle.find")


def run_watched(job, out):
    """Run each command; write to a file how it ended, and what it started, connected to and asked for."""
    folder, events, answers = None, [], {}

    def hook(event, arguments):
        if folder is None:
            return
        if event == "exec":
            name = arguments[0].co_filename
            if name.startswith(folder) or "transformers_modules" in name:
                events.append([event, name])
        elif event.startswith((*WATCHED, "socket.connect", "socket.getaddrinfo", "socket.sendto")):
            events.append([event, str(arguments)[:200]])

    torch.accelerator.current_accelerator = lambda check_available=False: None  # CUDA does not work in a fork
    sys.addaudithook(hook)
    for name, (folder, command) in job.items():
        events.clear()
        result = CliRunner().invoke(app, command, input="y\ny\ny\n")
        answers[name] = {"code": result.exit_code, "text": result.output, "events": [*events]}
        folder = None
    out.write_text(json.dumps(answers))


@pytest.fixture(scope="module")
def photos(toy_pairs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    lines = ["file_name,caption"]
    for row in toy_pairs:
        (folder / f"{row['image_id']}.png").write_bytes(row["image"]["bytes"])
        lines.append(f"{row['image_id']}.png,{row['captions'][0]}")
    (folder / "metadata.csv").write_text("\n".join(lines))
    return folder


def make_bad(kind, good, folder):
    """Copy a model's folder, with code in it that creates a file when run, and something that names the code."""
    shutil.copytree(good, folder)
    (folder / "evil.py").write_text(EVIL.format(mark=str(folder.with_suffix(".mark"))))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    KINDS[kind][0](folder)
    return folder


@pytest.fixture(scope="module")
def answers(tiny_folder, photos, tmp_path_factory):
    """Run every command on every kind of folder, in one process that records what it starts and connects to."""
    root = tmp_path_factory.mktemp("bad")
    job = {}
    for kind in KINDS:
        folder = make_bad(kind, tiny_folder, root / kind)
        paths = {"BAD": folder, "GOOD": tiny_folder, "PHOTOS": photos, "OUT": root / "out"}
        for name, arguments in COMMANDS.items():
            words = []
            for word in arguments:
                for key, path in paths.items():
                    word = word.replace(key, str(path))
                words.append(word)
            job[f"{kind}: {name}"] = (str(folder), words)
    # A fork, since a hook cannot be taken away.
    process = multiprocessing.get_context("fork").Process(target=run_watched, args=(job, root / "answers.json"))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    marks = [path.name for path in root.glob("*.mark")]
    return {**json.loads((root / "answers.json").read_text()), "marks": marks}


@pytest.mark.parametrize("kind", KINDS)
def test_every_command_names_what_it_refuses_and_runs_nothing(kind, answers):
    for name in COMMANDS:
        answer = answers[f"{kind}: {name}"]
        assert answer["code"] == 2, (name, answer["text"][-1500:])
        assert answer["events"] == [], name
        for words in KINDS[kind][1]:
            assert words in answer["text"], (name, answer["text"][-1500:])
        assert "[y/N]" not in answer["text"]
    assert answers["marks"] == []


def test_good_folders_pass(tiny_folder, clip_folder, siglip_folder):
    for folder in (tiny_folder, clip_folder, siglip_folder):
        assert refuse_code(folder) == folder


def test_a_folder_with_checkpoints_in_it_passes(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder, tmp_path / "tuned")
    shutil.copytree(tiny_folder, tmp_path / "tuned" / "checkpoint-12")
    refuse_code(tmp_path / "tuned")


@pytest.mark.parametrize(
    "content",
    [
        {"auto_map": None},
        {"auto_map": {}},
        {"attn_implementation": "sdpa", "_name_or_path": "org/name", "trust_remote_code": False},
        {
            "architecture": "resnet50",
            "pretrained_cfg": {"hf_hub_id": "timm/x", "url": ""},
            "model_args": {"img_size": 9},
        },
        {"activation_function": "gelu"},
        {"activation_function": "torch.nn.modules.activation.Tanh"},
        {"base_model_name_or_path": None},
    ],
)
def test_usual_keys_pass(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content))
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model.bin"}}))
    refuse_code(tmp_path)


@pytest.mark.parametrize(
    "content", [[1], {"model_type": "timm_wrapper", "architecture": "nothing"}, {"model_type": 5}]
)
def test_a_broken_model_of_another_library_is_a_value_error(content, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=rf"{tmp_path}.* (holds a model of type|is not a JSON object)"):
        load_encoder(tmp_path)


OF_OTHER_LIBRARIES = [
    ("config.json", {"model_type": "clip", "auto_map": {"AutoModel": "evil.Evil"}}, "auto_map"),
    ("config.json", {"backbone_config": {"backbone_kwargs": {"checkpoint_path": "a.pth"}}}, "backbone_kwargs.check"),
    ("config.json", {"backbone": "hf_hub:evil/one"}, "backbone is"),
    ("open_clip_config.json", {"model_cfg": {"text_cfg": {"tokenizer_kwargs": {"trust_remote_code": True}}}}, "trust"),
    ("open_clip_config.json", {"model_cfg": {"vision_cfg": {"timm_model_name": "local-dir:x"}}}, "timm_model_name"),
    ("1_Dense/config.json", {"activation_function": "os.abort"}, "1_Dense/config.json, activation_function"),
    ("1_Dense/router_config.json", {"types": {"query": "evil.Evil"}}, "types.query"),
    ("tokenizer_config.json", {"auto_map": ["evil.Evil", None]}, "auto_map"),
    ("config.4.0.0.json", {"auto_map": {"AutoConfig": "evil.Evil"}}, "config.4.0.0.json, auto_map"),
    ("sentence_bert_config.json", {"config_kwargs": {"text_config": {"auto_map": {"AutoModel": "a.B"}}}}, "auto_map"),
    ("sentence_bert_config.json", {"tokenizer_name_or_path": "evil/other"}, "tokenizer_name_or_path"),
    ("sentence_bert_config.json", {"model_kwargs": {"subfolder": "../clip"}}, "model_kwargs.subfolder"),
    ("0_Router/q_0/config.json", {"text_config": {"auto_map": {"AutoModel": "a.B"}}}, "text_config.auto_map"),
    (".hidden/config.json", {"auto_map": {"AutoModel": "a.B"}}, ".hidden/config.json, auto_map"),
    ("model.safetensors.index.json", {"weight_map": {"a": "evil.bin"}}, "weight_map.a"),
]


@pytest.mark.parametrize(("file", "content", "words"), OF_OTHER_LIBRARIES)
def test_files_of_other_libraries(file, content, words, tmp_path):
    stock = "sentence_transformers.models."
    listed = [{"type": f"{stock}Transformer", "path": ""}, {"type": f"{stock}Dense", "path": "1_Dense"}]
    (tmp_path / "modules.json").write_text(json.dumps(listed))
    refuse_code(tmp_path)
    (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(ValueError, match="is refused: in its ") as caught:
        refuse_code(tmp_path)
    assert words in str(caught.value)


@pytest.mark.parametrize("text", ["{", "[" * 100_000, "5", "null", "\xff"])
def test_a_broken_file_is_left_to_its_library(text, tmp_path):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    (tmp_path / "modules.json").write_text(text, encoding="latin-1")
    refuse_code(tmp_path)


def test_a_model_in_the_cache_is_checked_without_the_hub(tiny_folder, tmp_path, monkeypatch):
    repository, commit = tmp_path / "models--org--tiny", "a" * 40
    shutil.copytree(tiny_folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    refuse_code("org/tiny")
    change("config.json", auto_map={"AutoTokenizer": "x.y"})(repository / "snapshots" / commit)
    with pytest.raises(ValueError, match="org/tiny is refused"):
        refuse_code("org/tiny")


def test_the_towers_of_a_preset_are_checked_too(tiny_model, tiny_processor, tmp_path):
    from clipmini.training.build import ModelPreset, build_model

    vision, text = tmp_path / "vision", tmp_path / "text"
    tiny_model.vision_model.save_pretrained(vision)
    tiny_model.text_model.save_pretrained(text)
    tiny_processor.tokenizer.save_pretrained(text)
    build_model(ModelPreset(str(vision), str(text)))
    change("tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", None]})(text)
    with pytest.raises(ValueError, match=r"text is refused: in its tokenizer_config\.json, auto_map"):
        build_model(ModelPreset(str(vision), str(text)))
