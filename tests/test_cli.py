"""The command as a user meets it: what goes to stdout, what to stderr, and the exit codes."""

import inspect
import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image
from torch._utils import ExceptionWrapper
from typer.testing import CliRunner

import clipmini.indexing.index
import clipmini.inference.encoders
import clipmini.training.run
from clipmini import cli
from clipmini.evaluation.results import Run, SearchExample
from clipmini.inference import teacher
from clipmini.recipe_files import SECTIONS, section_keys
from clipmini.store import stored_rows
from modeling_clipmini.handler import DEFAULT_TEMPLATE
from modeling_clipmini.images_clipmini import ImageError


@pytest.fixture
def run():
    """Run the command in this process."""

    def invoke(*arguments):
        return CliRunner().invoke(cli.app, [str(argument) for argument in arguments], prog_name="clipmini")

    return invoke


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (40 + 30 * index, 60), color).save(folder / f"{color}.png")
    return folder


def assert_refused(result, *words):
    """One sentence on stderr, exit code 2, no traceback, nothing on stdout."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    error_lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(error_lines) == 1
    assert result.stderr.splitlines()[-1] == error_lines[0]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in error_lines[0]


class TestHelp:
    @pytest.mark.parametrize("verb", ["train", "teach", "evaluate", "search", "classify", "serve", "push", "cache"])
    def test_has_an_example(self, run, verb):
        result = run(verb, "--help")
        assert result.exit_code == 0
        assert f"Example: clipmini {verb} " in result.stdout

    def test_every_key_of_a_recipe_is_listed_with_its_default(self, run, monkeypatch):
        monkeypatch.setenv("COLUMNS", "100")
        lines = run("train", "--help").stdout.splitlines()
        first_words = [line.split()[0] for line in lines if line.strip()]
        for section in SECTIONS:
            assert set(section_keys(section)) <= set(first_words)
        assert first_words.index("source") < first_words.index("projection") < first_words.index("freeze_vision")
        assert first_words.index("teacher") < first_words.index("learning_rate")
        (line,) = (line for line in lines if line.startswith("learning_rate "))
        assert line.split() == "learning_rate 5e-05 The initial learning rate for the optimizer.".split()
        assert max(map(len, lines)) <= 100

    def test_version(self, run):
        result = run("--version")
        assert (result.exit_code, result.stdout.split()[0]) == (0, "clipmini")

    def test_the_template_shown_is_the_default(self):
        option = inspect.signature(cli.classify, eval_str=True).parameters["template"].annotation.__metadata__[0]
        assert f'Default: "{DEFAULT_TEMPLATE}"' in option.help


class TestSearch:
    def test_table(self, run, tiny_folder, images):
        result = run("search", tiny_folder, images, "a fish", "--top", 2)
        assert result.exit_code == 0, result.output
        best = json.loads(run("search", tiny_folder, images, "a fish", "--json").stdout)["hits"]
        assert [hit["score"] for hit in best] == sorted((hit["score"] for hit in best), reverse=True)
        rows = [line for line in result.stdout.splitlines() if ".png" in line]
        assert len(rows) == 2
        for number, (row, hit) in enumerate(zip(rows, best[:2], strict=True), start=1):
            cells = [cell.strip() for cell in row.strip("│").split("│")]
            assert cells == [str(number), f"{hit['score']:.3f}", hit["path"]]

    def test_top_above_the_number_of_images(self, run, tiny_folder, images):
        result = run("search", tiny_folder, images, "a fish", "--top", 50, "--json")
        assert len(json.loads(result.stdout)["hits"]) == 3

    def test_broken_images_are_listed(self, run, tiny_folder, images):
        (images / "bad.jpg").write_bytes(b"no image")
        result = run("search", tiny_folder, images, "a fish", "--json")
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert len(answer["hits"]) == 3
        (skipped,) = answer["skipped"]
        assert skipped["path"] == str(images / "bad.jpg")
        assert skipped["reason"].startswith("is not an image of a format that is read here: JPEG, PNG")
        lines = [line for line in result.stderr.splitlines() if line.startswith("warning: ")]
        assert len(lines) == 2
        assert "bad.jpg" in lines[0]
        assert lines[1] == "warning: 1 input skipped"

    def test_strict(self, run, tiny_folder, images):
        (images / "bad.jpg").write_bytes(b"no image")
        assert_refused(run("search", tiny_folder, images, "a fish", "--strict"), "bad.jpg", "is not an image")

    def test_draws(self, run, tiny_folder, images, tmp_path):
        result = run("search", tiny_folder, images, "a fish", "--out", tmp_path / "new" / "result.png")
        assert result.exit_code == 0, result.output
        with Image.open(tmp_path / "new" / "result.png") as image:
            assert image.format == "PNG"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["{images}", ""], ["query is empty"]),
            (["{images}", "a \udcff fish"], ["query", "\\udcff", "UTF-8"]),
            (["{images}", "a fish", "--top", "0"], ["top=0"]),
            (["{images}", "a fish", "--top", "many"], ["--top"]),
            (["{images}", "a fish", "--out", "result.gif"], ["result.gif", ".png"]),
            (["{images}/none", "a fish"], ["does not exist"]),
            (["{images}/red.png", "a fish"], ["not a folder"]),
            (["{tiny_folder}", "a fish"], ["no images"]),
            (["{images}"], ["QUERY"]),
            (["{images}", "a fish", "image:none.png"], ["none.png: does not exist"]),
            (["{images}", "a fish", "--minus", "a fish"], ["Nothing is left"]),
            (["{images}", "a fish", "--model", "other"], ["--model", "no index"]),
            (["{images}", "a fish", "--tip", "3"], ["--tip"]),
        ],
    )
    def test_bad_input(self, run, tiny_folder, images, options, words):
        options = [option.format(images=images, tiny_folder=tiny_folder) for option in options]
        assert_refused(run("search", tiny_folder, *options), *words)

    def test_not_a_model(self, run, tiny_folder, images, tmp_path):
        assert_refused(run("search", tmp_path / "none", images, "a"), "none does not exist")
        assert_refused(run("search", "none", images, "a"), "none does not exist")
        assert_refused(run("search", images, images, "a"), "no config.json")
        other = tmp_path / "other"
        other.mkdir()
        (other / "config.json").write_text('{"model_type": "bert"}')
        assert_refused(run("search", other, images, "a"), "other holds a model of type 'bert'")
        (other / "config.json").write_text("{")
        assert_refused(run("search", other, images, "a"), "is not a JSON object")

    @pytest.mark.parametrize("damage", ["truncated", "missing", "tokenizer", "other shapes"])
    def test_damaged_model(self, run, tiny_folder, images, tmp_path, damage):
        damaged = tmp_path / "damaged"
        shutil.copytree(tiny_folder, damaged)
        weights = damaged / "model.safetensors"
        if damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:5000])
        elif damage == "missing":
            weights.unlink()
        elif damage == "tokenizer":
            (damaged / "tokenizer.json").unlink()
        else:
            config = json.loads((damaged / "config.json").read_text())
            (damaged / "config.json").write_text(json.dumps({**config, "projection_dim": 8}))
        assert_refused(run("search", damaged, images, "a"), "damaged is incomplete or damaged")


class TestClassify:
    def test_table(self, run, tiny_folder, images):
        result = run("classify", tiny_folder, images / "red.png", images / "blue.png", "--labels", "cat, dog")
        assert result.exit_code == 0, result.output
        assert [result.stdout.count(word) for word in ("red.png", "blue.png", "cat", "dog")] == [1, 1, 2, 2]

    def test_json(self, run, tiny_folder, images):
        options = ["--labels", "cat,dog", "--json", "--template", "{}!"]
        result = run("classify", tiny_folder, images / "red.png", *options)
        answer = json.loads(result.stdout)
        assert answer["template"] == "{}!"
        (row,) = answer["results"]
        assert row["path"] == str(images / "red.png")
        assert sum(item["score"] for item in row["scores"]) == pytest.approx(1.0)
        assert sorted(item["label"] for item in row["scores"]) == ["cat", "dog"]
        assert row["scores"][0]["score"] >= row["scores"][1]["score"]

    @pytest.mark.parametrize(
        ("options", "labels"),
        [
            (["--labels", "a fish", "--labels", "a dog, running"], ["a dog, running", "a fish"]),
            (["--labels", '"Paris, France", "London, England" ,fish'], None),
            (["--labels", '"Paris, France", "London, England",fish'], ["London, England", "Paris, France", "fish"]),
            (["--labels", 'a 5" pipe,the "stop" sign'], ['a 5" pipe', 'the "stop" sign']),
            (["--labels", '"a ""stop"" sign"'], ['a "stop" sign']),
            (["--labels", "labels.txt"], ["Paris, France", "fish"]),
        ],
    )
    def test_labels_with_commas(self, run, tiny_folder, images, monkeypatch, tmp_path, options, labels):
        monkeypatch.chdir(tmp_path)
        Path("labels.txt").write_bytes("\ufeffParis, France\r\nfish\r\n\r\n".encode())
        result = run("classify", tiny_folder, images / "red.png", *options, "--json")
        if labels is None:
            assert_refused(result, "quotation marks")
            return
        assert result.exit_code == 0, result.output
        (row,) = json.loads(result.stdout)["results"]
        assert sorted(item["label"] for item in row["scores"]) == labels
        assert ("read 2 labels from the file labels.txt, one a line" in result.stderr) == ("labels.txt" in options)

    def test_some_images_are_broken(self, run, tiny_folder, images):
        result = run("classify", tiny_folder, "none.png", images / "red.png", "--labels", "cat,dog", "--json")
        assert result.exit_code == 0, result.output
        answer = json.loads(result.stdout)
        assert len(answer["results"]) == 1
        assert answer["skipped"] == [{"path": "none.png", "reason": "does not exist"}]
        assert "warning: 1 input skipped" in result.stderr

    def test_all_images_are_broken(self, run, tiny_folder):
        assert_refused(run("classify", tiny_folder, "none.png", "no.png", "--labels", "cat"), "No image", "no.png")

    def test_strict(self, run, tiny_folder, images):
        arguments = ["classify", tiny_folder, images / "red.png", "none.png", "--labels", "cat", "--strict"]
        assert_refused(run(*arguments), "none.png")

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ([], ["--labels"]),
            (["--labels", ""], ["blank"]),
            (["--labels", "cat,,dog"], ["Label 2 of 3", "blank"]),
            (["--labels", "cat, cat"], ["'cat'", "twice"]),
            (["--labels", "cat", "--template", "a photo"], ["template", "{}"]),
            (["--labels", "cat,\udcff"], ["label", "\\udcff", "UTF-8"]),
            (["--labels", "gone.txt"], ["file of labels gone.txt does not exist"]),
            (["--labels", '"cat, dog'], ["cannot be split", "quotation marks"]),
            (["--labels", "cat", "--labels", "cat"], ["'cat'", "twice"]),
        ],
    )
    def test_bad_input(self, run, tiny_folder, images, options, words):
        assert_refused(run("classify", tiny_folder, images / "red.png", *options), *words)


RECALLS = {f"{direction}_r{k}": 0.25 for direction in ("text_to_image", "image_to_text") for k in (1, 5, 10)}


class TestTrain:
    @pytest.fixture
    def calls(self, monkeypatch, tmp_path):
        """Replace the training, which has tests of its own."""
        calls = []

        def fake_train(recipe, *, overwrite=False, stage=None):
            calls.append((recipe, overwrite, stage))
            sys.stdout.write("{'loss': 1.0}\n")
            split = {
                "num_images": 32,
                "num_captions": 33,
                "chance": {**RECALLS, "mean_recall": 0.0312},
                "before": {**RECALLS, "mean_recall": 0.5},
                "after": {**RECALLS, "mean_recall": 1.0},
                "intervals": {"mean_recall": [0.9, 1.0]},
            }
            skipped = [{"path": "7.png", "reason": "is empty"}]
            results = {"num_skipped": 1, "skipped": skipped, "splits": {"validation": split, "test": split}}
            folder = tmp_path / "my run"
            folder.mkdir(exist_ok=True)
            example = SearchExample(recipe.data.source, "a cat's $1 `hat`", "test", True)
            return Run(folder, results, None if recipe.data.split_seed == 7 else example)

        monkeypatch.setattr(clipmini.training.run, "train", fake_train)
        return calls

    @pytest.fixture
    def recipe(self, tmp_path):
        file = tmp_path / "recipe.yaml"
        file.write_text(f"model: tiny\ndata:\n  source: {tmp_path}\n")
        return file

    def test_table(self, run, calls, recipe, tmp_path):
        result = run("train", recipe, "--set", "num_train_epochs=3", "--set", "seed=7", "--overwrite", "--strict")
        assert result.exit_code == 0, result.output
        ((loaded, overwrite, stage),) = calls
        assert stage is None
        assert (loaded.training.num_train_epochs, loaded.training.seed, overwrite) == (3, 7, True)
        assert loaded.data.strict
        lines = result.stdout.splitlines()
        assert "test: 32 images, 33 captions; recall in percent" in lines
        row = next(line for line in lines if "mean recall" in line)
        cells = [cell.strip() for cell in row.strip("│").split("│")]
        assert cells == ["mean recall", "3.1", "50.0", "100.0", "90.0 to 100.0"]
        row = next(line for line in lines if "text to image R@10" in line)
        assert [cell.strip() for cell in row.strip("│").split("│")][1:] == ["25.0", "25.0", "25.0", ""]
        assert lines[-2] == "Try it with a caption of the test split, whose image it ranks first there:"
        model, query = f"'{tmp_path}/my run/model'", "'a cat'\"'\"'s $1 `hat`'"
        assert lines[-1] == f"clipmini search {model} {tmp_path} {query}"
        assert "'loss'" in result.stderr
        assert "'loss'" not in result.stdout

    def test_without_a_folder_of_images_no_search_is_suggested(self, run, calls, recipe, tmp_path):
        recipe.write_text(recipe.read_text() + "  split_seed: 7\n")  # see `calls`
        lines = run("train", recipe).stdout.splitlines()
        assert lines[-1] == f"The model is in {tmp_path}/my run/model"

    def test_keys_of_the_recipe_are_options_too(self, run, calls, recipe):
        recipe.write_text(recipe.read_text() + "stages:\n  heads: {}\n")
        options = ["--gradient_cache_chunk", "8", "--matryoshka_dims=16,8", "--stage", "heads"]
        result = run("train", recipe, *options)
        assert result.exit_code == 0, result.output
        ((loaded, _, stage),) = calls
        assert loaded.training.gradient_cache_chunk == 8
        assert loaded.training.matryoshka_widths == (16, 8)
        assert stage == "heads"

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--gradient_cache_chunks", "8"], ["gradient_cache_chunks", "nearest", "gradient_cache_chunk"]),
            (["--gradient_cache_chunk"], ["needs a value"]),
            (["stray"], ["'stray' is not expected"]),
        ],
    )
    def test_options_that_are_not_keys(self, run, calls, recipe, options, words):
        result = run("train", recipe, *options)
        assert result.exit_code == 2
        assert all(word in result.stderr for word in words), result.stderr

    def test_json(self, run, calls, recipe, tmp_path):
        result = run("train", recipe, "--json")
        answer = json.loads(result.stdout)
        assert (answer["num_skipped"], answer["skipped"]) == (1, [{"path": "7.png", "reason": "is empty"}])
        assert answer["model_dir"] == str(tmp_path / "my run" / "model")
        assert answer["splits"]["test"]["after"]["mean_recall"] == 1.0
        assert not calls[0][0].data.strict

    @pytest.mark.parametrize(
        ("options", "words"),
        [
            (["--set", "num_train_epoch=3"], ["num_train_epoch", "nearest", "num_train_epochs"]),
            (["--set", "num_train_epochs"], ["key=value"]),
            (["--set", "num_train_epochs=many"], ["num_train_epochs='many'"]),
        ],
    )
    def test_bad_recipe(self, run, calls, recipe, options, words):
        assert_refused(run("train", recipe, *options), *words)
        assert not calls

    def test_a_dry_run_shows_the_recipe_and_its_data_and_writes_nothing(self, run, calls, recipe, images, tmp_path):
        (images / "bad.png").write_bytes(b"")
        names = [path.name for path in images.iterdir()]
        (images / "metadata.csv").write_text("\n".join(["file_name,caption", *(f"{name},a {name}" for name in names)]))
        before = sorted(tmp_path.rglob("*"))
        output = tmp_path / "run"
        options = ["train", recipe, "--dry-run", "--source", images, "--seed", "7", "--output_dir", output]
        options += ["--max_skipped", "0.5"]
        answer = json.loads(run(*options, "--json").stdout)
        assert answer["recipe"]["training"] == {"seed": 7, "output_dir": str(output)}
        assert answer["splits"] == {
            name: {"num_images": 1, "num_captions": 1} for name in ("train", "validation", "test")
        }
        assert [Path(item["path"]).name for item in answer["skipped"]] == ["bad.png"]
        assert answer["output_dir"] == str(output)
        assert answer["start"] == {"": "starts anew"}
        text = run(*options).stdout
        assert "  seed: 7\n" in text
        assert "Inputs that would be skipped: 1" in text
        assert "It starts anew" in text
        assert sorted(tmp_path.rglob("*")) == before
        assert not calls

    def test_a_dry_run_says_what_would_be_resumed_or_refused(self, run, recipe, images, tmp_path):
        names = [path.name for path in images.iterdir()]
        (images / "metadata.csv").write_text("\n".join(["file_name,caption", *(f"{name},a {name}" for name in names)]))
        output = tmp_path / "run"
        options = ["train", recipe, "--source", images, "--output_dir", output, "--use_cpu", "true"]
        options += ["--num_train_epochs", "1"]
        assert run(*options).exit_code == 0
        assert_refused(run(*options, "--dry-run"), "holds a finished run")
        assert "It replaces the run that is there" in run(*options, "--dry-run", "--overwrite").stdout
        (output / "results.json").unlink()
        assert "It resumes from" in run(*options, "--dry-run").stdout
        assert "checkpoint-1" in run(*options, "--dry-run").stdout

    def test_no_such_recipe(self, run, calls):
        assert_refused(run("train", "nothing"), "nothing", "demo")


class TestErrors:
    """Every verb fails the same way; `search` represents them all."""

    @pytest.fixture
    def fail_with(self, monkeypatch, run, tiny_folder, images):
        def fail(error, *options):
            def load_encoder(name, engine):
                raise error

            monkeypatch.setattr(clipmini.indexing.index, "load_encoder", load_encoder)
            return run(*options, "search", tiny_folder, images, "a")

        return fail

    def test_values(self, fail_with):
        assert_refused(fail_with(ValueError("first\n  second")), "error: first second")
        assert_refused(fail_with(ValueError()), "error: ValueError")

    def test_files(self, fail_with):
        assert_refused(fail_with(FileNotFoundError(2, "No such file", "x.png")), "error: x.png: No such file.")
        assert_refused(fail_with(OSError("the disk is full")), "error: the disk is full")

    def test_from_a_data_worker(self, fail_with):
        try:
            raise ImageError("photos/7.png: is empty (zero bytes)")
        except ImageError:
            wrapped = ExceptionWrapper(where="in DataLoader worker process 0")
        with pytest.raises(ImageError, match="Original Traceback") as caught:
            wrapped.reraise()
        result = fail_with(caught.value)
        assert_refused(result, "photos/7.png")
        assert result.stderr.splitlines()[-1] == "error: photos/7.png: is empty (zero bytes)"

    def test_a_bug_shows(self, fail_with):
        result = fail_with(RuntimeError("oh"))
        assert result.exit_code == 1
        assert result.stderr.splitlines()[-1] == "RuntimeError: oh"

    def test_a_package_that_is_missing(self, fail_with):
        assert_refused(
            fail_with(ImportError("Please install it with `pip install liger-kernel`")), "pip install liger"
        )
        assert fail_with(ImportError("cannot import name 'a' from 'b'")).exit_code == 1

    def test_files_that_nest_too_deeply(self, tmp_path, tiny_folder):
        (tmp_path / "deep.yaml").write_text("[" * 1000 + "]" * 1000)
        (tmp_path / "index").mkdir()
        (tmp_path / "index" / "manifest.json").write_text('{"schema_version":' + "[" * 100_000 + "]" * 100_000 + "}")
        for arguments in (
            ["train", tmp_path / "deep.yaml"],
            ["train", "demo", "--set", "augment=" + "[" * 1000 + "]" * 1000, "--dry-run"],
            ["train", "demo", "--set", "lora" + ".a" * 1000 + "=1"],
            ["classify", tiny_folder, "a.png", "--labels", "a,b", "--template", tmp_path / "deep.yaml"],
            ["search", tmp_path / "index", "a dog"],
        ):
            done = CliRunner().invoke(cli.app, list(map(str, arguments)), prog_name="clipmini")
            assert_refused(done, "error: ")
            assert len(done.stderr.splitlines()) == 1

    def test_debug_shows_the_traceback(self, fail_with):
        result = fail_with(ValueError("oh"), "--debug")
        assert result.exit_code == 2
        assert "Traceback" in result.stderr
        assert result.stderr.splitlines()[-1] == "error: oh"

    def test_interrupted(self, fail_with):
        assert fail_with(KeyboardInterrupt()).exit_code == 130

    def test_no_such_verb(self, run):
        assert_refused(run("serch"), "serch", "clipmini --help")


def test_warnings_are_short_lines(run, tiny_folder, images, monkeypatch):
    load_encoder = clipmini.indexing.index.load_encoder

    def noisy_load(name, engine):
        warnings.warn("mind\n the gap", stacklevel=2)
        logging.getLogger("transformers.somewhere").warning("from %s", "transformers")
        logging.getLogger("timm").warning("from timm")
        sys.stdout.write("from print\n")
        return load_encoder(name, engine)

    monkeypatch.setattr(clipmini.indexing.index, "load_encoder", noisy_load)
    handlers = list(logging.getLogger().handlers)
    result = run("search", tiny_folder, images, "a", "--json")
    assert json.loads(result.stdout)["num_skipped"] == 0
    lines = result.stderr.splitlines()
    for line in ("warning: mind the gap", "warning: from transformers", "warning: from timm", "from print"):
        assert lines.count(line) == 1
    assert "Loading weights" not in result.stderr
    transformers_handlers = map(type, logging.getLogger("transformers").handlers)
    assert logging.StreamHandler not in transformers_handlers  # it would print every line again
    assert logging.getLogger().handlers == handlers


class TestTeach:
    def test_training_pairs_of_a_recipe_are_embedded(self, run, tiny_folder, tmp_path):
        for index in range(6):
            Image.new("RGB", (32, 32), (40 * index, 90, 90)).save(tmp_path / f"{index}.png")
        lines = [f"{index}.png,image {index},{'train' if index else 'validation'}" for index in range(6)]
        (tmp_path / "metadata.csv").write_text("\n".join(["file_name,caption,split", *lines]))
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(f"model: tiny\ndata:\n  source: {tmp_path}\n")
        out = tmp_path / "teacher.parquet"
        result = run("teach", tiny_folder, recipe, "--out", out, "--json")
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == {"file": str(out), "num_images": 5}
        assert run("teach", tiny_folder, recipe, "--out", out).exit_code == 2
        assert run("teach", tiny_folder, recipe, "--out", out, "--overwrite").exit_code == 0

        again = ("teach", tiny_folder, recipe, "--out", out, "--overwrite")
        assert run(*again, "--logit-scale", "50").exit_code == 0
        assert b'"logit_scale": 50.0' in pq.read_schema(out).metadata[teacher.METADATA_KEY]


class TestCache:
    def test_is_listed_and_cleared(self, run):
        keys = np.zeros((1, 16), np.uint8)
        stored_rows({}, keys, lambda _: np.ones((1, 3)), dtype="float16", chunk_rows=1, description="some numbers")
        assert "some numbers" in run("cache").stdout
        assert run("cache", "--older-than", "1", "--json").stdout == '{\n  "kept": []\n}\n'
        (kept,) = json.loads(run("cache", "--json").stdout)["kept"]
        assert (kept["description"], kept["num_rows"]) == ("some numbers", 1)
        assert json.loads(run("cache", "--clear", "--json").stdout)["removed"][0]["folder"] == kept["folder"]
        assert json.loads(run("cache", "--json").stdout) == {"kept": []}
        assert_refused(run("cache", "--clear", "--older-than", "-1"), "--older-than")
