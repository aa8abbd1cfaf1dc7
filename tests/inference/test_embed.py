"""Damaged model folders and unreadable images: one sentence names each."""

import json
import multiprocessing
import os
import platform
import shutil
import subprocess
import sys

import pandas
import pytest
import torch
from PIL import Image
from torch import nn

from clipmini.inference import embed
from clipmini.inference.embed import DualEncoder, hash_weights, keep_freed_memory, load_model
from clipmini.inference.prompts import check_text
from modeling_clipmini.images_clipmini import ImageError, read_named


@pytest.fixture
def damage(tiny_folder, tmp_path):
    """Copy the tiny model and change one of its JSON files."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_folder, folder)

    def write(name, change):
        values = json.loads((folder / name).read_text())
        change = change(values) if callable(change) else change
        (folder / name).write_text(json.dumps(change))
        return folder

    return write


class TestLoadModel:
    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda config: config | {"vision_config": 5}, "vision_config"),
            (lambda config: config | {"text_config": "x"}, "text_config"),
            (lambda config: config | {"text_config": config["text_config"] | {"dim": "wide"}}, "dim"),
            (lambda config: config | {"vision_config": {"architecture": "resnet_of_tomorrow"}}, "resnet_of_tomorrow"),
            (
                lambda config: config | {"vision_config": config["vision_config"] | {"model_args": 5}},
                "model_args=5 is not allowed; use a dict",
            ),
            (lambda config: config | {"dtype": 7}, "int"),
        ],
    )
    def test_damaged_config(self, damage, change, reason):
        folder = damage("config.json", change)
        with pytest.raises(ValueError, match=rf"damaged is incomplete or damaged \(its model\): .*{reason}") as caught:
            load_model(folder)
        assert str(folder) in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.__cause__ is not None

    @pytest.mark.parametrize("name", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
    def test_damaged_processor(self, damage, name):
        with pytest.raises(ValueError, match=r"damaged is incomplete or damaged \(its processor\): .+\.$") as caught:
            load_model(damage(name, []))
        assert caught.value.__cause__ is not None

    def test_deeply_nested_config(self, damage):
        folder = damage("config.json", {})
        (folder / "config.json").write_text("[" * 200_000)
        with pytest.raises(ValueError, match=r"config\.json is not a JSON object"):
            load_model(folder)

    def test_error_without_a_message(self, tiny_folder, monkeypatch):
        def fail(*_, **__):
            raise KeyError

        monkeypatch.setattr(embed.ClipMiniProcessor, "from_pretrained", fail)
        with pytest.raises(ValueError, match=r"\(its processor\): KeyError\.$"):
            load_model(tiny_folder)


class TestErrorsNameTheImage:
    def test_path(self, tmp_path):
        (tmp_path / "7.png").write_bytes(b"")
        for source in (tmp_path / "7.png", str(tmp_path / "7.png"), {"bytes": b"", "path": str(tmp_path / "7.png")}):
            with pytest.raises(ImageError) as caught:
                read_named(source, "image 8")
            assert str(caught.value) == f"{tmp_path / '7.png'}: is empty (zero bytes)"

    @pytest.mark.parametrize("source", [b"", {"bytes": b"", "path": None}])
    def test_number_where_there_is_no_path(self, source):
        with pytest.raises(ImageError) as caught:
            read_named(source, "image 8")
        assert str(caught.value) == "image 8: is empty (zero bytes)"

    def test_readable_image(self):
        assert read_named(Image.new("RGB", (4, 3), "red"), "x").getpixel((0, 0)) == (255, 0, 0)

    def test_when_encoding(self, tiny_model, tmp_path):
        good = Image.new("RGB", (4, 3))
        with pytest.raises(ImageError, match=r"none\.png: does not exist$"):
            DualEncoder(tiny_model).encode_images([good, tmp_path / "none.png"])
        with pytest.raises(ImageError, match=r"^image 2: is empty"):
            DualEncoder(tiny_model).encode_images([good, b""])


def test_embeddings_have_length_one(tiny_model):
    embeds = DualEncoder(tiny_model).encode_images([Image.new("RGB", (4, 3), color) for color in ("red", "blue")])
    torch.testing.assert_close(embeds.norm(dim=1), torch.ones(2))


def test_check_text():
    check_text("query", "日本 🐟")
    with pytest.raises(ValueError, match=r"^The query 'a \\udcff fish' is not text in UTF-8"):
        check_text("query", "a \udcff fish")


def small_net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_equal_weights_have_equal_hashes():
    assert hash_weights(small_net()) == hash_weights(small_net())
    assert hash_weights(small_net()) == hash_weights(small_net().to(memory_format=torch.channels_last))
    assert hash_weights(small_net()) == hash_weights(small_net().requires_grad_(False).eval())


@pytest.mark.parametrize("name", ["0.weight", "0.bias", "1.running_mean", "1.running_var", "1.num_batches_tracked"])
def test_any_changed_number_changes_the_hash_of_weights(name):
    net = small_net()
    net.state_dict()[name].view(-1)[-1:] += 1
    assert hash_weights(net) != hash_weights(small_net())


def test_names_shapes_and_dtypes_are_part_of_the_hash_of_weights():
    def holding(name, value):
        module = nn.Module()
        module.register_buffer(name, value)
        return hash_weights(module)

    zeros = torch.zeros(4)
    others = [("b", zeros), ("a", zeros.view(2, 2)), ("a", zeros.view(torch.int32)), ("a", zeros.bfloat16())]
    assert len({holding("a", zeros), *(holding(*other) for other in others)}) == 5


def test_no_bar_where_bars_are_turned_off():
    """As the command does where stderr is a file; tqdm reads its variable when it is imported."""
    program = (
        "import torch\n"
        "from clipmini.inference.embed import DualEncoder\n"
        "from types import SimpleNamespace\n"
        "model = SimpleNamespace(processor=SimpleNamespace(min_edge=None))\n"
        "model.embed_captions = lambda texts: torch.ones(len(texts), 2)\n"
        "DualEncoder(model).encode_texts(['a'] * 9, batch_size=4)\n"
    )
    environment = {**os.environ, "TQDM_DISABLE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stderr == ""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_used_again():
    import resource  # not on Windows

    assert keep_freed_memory()
    for _ in range(20):  # until the heap has grown to its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(2**24)  # over the 32 MiB up to which glibc keeps what is freed unasked
        num_faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    assert num_faults < 2**26 / resource.getpagesize() / 10  # how often the system had to clear a page


def test_memory_is_left_alone_without_glibc(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    assert keep_freed_memory() is False


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_images_are_prepared_ahead_in_order_and_faults_keep_their_place(device, monkeypatch):
    """By threads, or for an accelerator, which need not be there, by worker processes."""
    monkeypatch.setattr(embed, "MANY_IMAGES", 20)
    monkeypatch.setattr(embed, "MAX_WORKERS", 2)

    def prepare(index, item):
        if item % 7 == 3:
            raise ImageError(f"is {item}")
        return index, torch.full((2,), item), os.getpid()

    prepared = list(embed.prepare_ahead(prepare, range(100, 140), torch.device(device)))
    assert len(prepared) == 40
    for index, result in enumerate(prepared):
        if isinstance(result, ImageError):
            assert (100 + index) % 7 == 3
            assert str(result) == f"is {100 + index}"
        else:
            assert (result[0], result[1].tolist()) == (index, [100 + index] * 2)
    processes = {result[2] for result in prepared if not isinstance(result, ImageError)}
    assert (processes == {os.getpid()}) == (device == "cpu" or sys.platform != "linux")


def test_no_more_images_are_read_than_a_few_ahead():
    taken = []

    def count():
        for number in range(1000):
            taken.append(number)
            yield number

    ahead = embed.prepare_ahead(lambda index, item: item, count(), torch.device("cpu"))
    assert next(ahead) == 0
    ahead.close()
    assert len(taken) == embed.NUM_AHEAD


def test_a_fault_of_another_kind_is_raised(monkeypatch):
    monkeypatch.setattr(embed, "MANY_IMAGES", 1)
    for device in ("cpu", "cuda"):
        with pytest.raises(ZeroDivisionError):
            list(embed.prepare_ahead(lambda index, item: 1 // item, [1, 0], torch.device(device)))


def test_a_column_of_paths_keeps_its_order(tiny_model, tmp_path, monkeypatch):
    """That of a pandas table that was shuffled or filtered, in which `images[0]` is not the first."""
    monkeypatch.setattr(embed, "MANY_IMAGES", 2)
    paths = [str(tmp_path / f"{color}.png") for color in ("red", "green", "blue")]
    for path in paths:
        Image.new("RGB", (40, 40), os.path.basename(path)[:-4]).save(path)
    column = pandas.Series(paths, index=[5, 0, 3])
    encoder = DualEncoder(tiny_model)
    kept, embeds = encoder.encode_files(column)
    assert list(map(str, kept)) == paths
    for device in ("cpu", "cuda"):
        ahead = embed.prepare_ahead(lambda index, path: path, column, torch.device(device))
        assert list(ahead) == paths
    torch.testing.assert_close(embeds, encoder.encode_images(column))


def _prepare_here():
    return list(embed.prepare_ahead(lambda index, item: item, [1, 2, 3], torch.device("cuda")))


def test_a_worker_process_starts_no_others(monkeypatch):
    monkeypatch.setattr(embed, "MANY_IMAGES", 2)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_prepare_here) == [1, 2, 3]
