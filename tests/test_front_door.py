"""What `import clipmini` offers, as a user meets it."""

import doctest
import json
import re
import subprocess
import sys
from pathlib import Path

import evaluate
import pytest
from PIL import Image

import clipmini
from clipmini.evaluation.results import Evaluation, Run
from clipmini.files import versions

NAMES = ["__version__", "classify", "convert", "evaluate", "export", "interpolate", "load", "metric", "open_index"]
NAMES += ["push", "search", "train"]


@pytest.fixture
def images(tmp_path):
    """Twelve plain images with a caption each."""
    folder = tmp_path / "images"
    folder.mkdir()
    for index in range(12):
        Image.new("RGB", (40, 32), (20 * index, 90, 90)).save(folder / f"{index}.png")
    lines = [f"{index}.png,number {index}" for index in range(12)]
    (folder / "metadata.csv").write_text("\n".join(["file_name,caption", *lines]))
    return folder


@pytest.fixture
def recipe(tmp_path, images):
    file = tmp_path / "recipe.yaml"
    values = {
        "model": "tiny",
        "data": {"source": str(images)},
        "training": {"output_dir": str(tmp_path / "run"), "num_train_epochs": 1, "use_cpu": True},
    }
    file.write_text(json.dumps(values))
    return file


def test_it_offers_exactly_these_names():
    assert dir(clipmini) == NAMES == clipmini.__all__
    assert all(getattr(clipmini, name).__doc__ for name in NAMES)
    assert versions()["clipmini"] == clipmini.__version__
    assert (Path(clipmini.__file__).parent / "py.typed").is_file()


def test_importing_it_is_light():
    slow = {"torch", "transformers", "timm", "datasets", "numpy", "PIL", "typer", "yaml"}
    program = f"import sys, clipmini; print({slow} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_example_of_each_function_is_true(name, pushable_folder, clip_folder, images, recipe):
    given = {
        "clipmini": clipmini,
        "evaluate": evaluate,
        "folder": pushable_folder,
        "clip_folder": clip_folder,
        "images": images,
        "image": images / "1.png",
        "recipe": recipe,
    }
    tests = doctest.DocTestFinder(recurse=False).find(getattr(clipmini, name), name, globs=given)
    assert [len(test.examples) > 0 for test in tests] == [True]
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    messages = []
    runner.run(tests[0], out=messages.append)
    assert runner.failures == 0, "".join(messages)


def test_wrong_input_is_refused(tmp_path, tiny_folder, images, recipe):
    for refused, message in (
        (lambda: clipmini.load("none"), "none does not exist"),
        (lambda: clipmini.train(recipe, learnin_rate=1), "nearest name is 'learning_rate'"),
        (lambda: clipmini.train(recipe, data={"sorce": 1}), "nearest name is 'source'"),
        (lambda: clipmini.train(recipe, stage="heads"), "no stage 'heads'"),
        (lambda: clipmini.train(recipe, source="no/such/folder"), "does not exist"),
        (lambda: clipmini.evaluate(tiny_folder, images, "captions"), "task='captions'"),
        (lambda: clipmini.evaluate(tiny_folder, images, baseline=tmp_path / "none"), "none does not exist"),
        (lambda: clipmini.search(tiny_folder, images, " "), "query is empty"),
        (lambda: clipmini.search(tiny_folder, tmp_path / "none", "a"), "does not exist"),
        (lambda: clipmini.classify(tiny_folder, images / "1.png", "cat"), "list of at least one"),
        (lambda: clipmini.push(tiny_folder, "name"), "name one as owner/name"),
    ):
        with pytest.raises(ValueError, match=message):
            refused()


class TestModelsAreGivenInAnyWay:
    def test_search(self, tiny_folder, images):
        model = clipmini.load(str(tiny_folder), "cpu")
        assert not model.training
        by_model, by_folder = (clipmini.search(given, images, "a", top=3) for given in (model, tiny_folder))
        assert [hit.image for hit in by_model] == [hit.image for hit in by_folder]
        # An index, which a folder has, holds vectors in float16.
        assert [hit.score for hit in by_model] == pytest.approx([hit.score for hit in by_folder], abs=2e-3)

    def test_evaluate(self, tiny_folder, clip_folder, images):
        model = clipmini.load(tiny_folder)
        evaluation = clipmini.evaluate(model, images, baseline=clip_folder)
        assert evaluation.results["model"]["name"] == "tiny0"
        assert evaluation.results["baseline"]["model"]["name"].startswith("clip")
        by_folder = clipmini.evaluate(tiny_folder, images)
        assert evaluation.results["metrics"] == by_folder.results["metrics"]


class TestRun:
    def test_what_a_run_shows(self, recipe, tmp_path):
        run = clipmini.train(recipe, **{"training.seed": 3})
        assert isinstance(run, Run)
        assert (run.folder, run.model_folder) == (tmp_path / "run", tmp_path / "run" / "model")
        recall = run.results["splits"]["test"]["after"]["mean_recall"]
        assert repr(run).startswith(f"<run in {tmp_path / 'run'}; mean recall in %: validation ")
        assert f"test {100 * recall:.1f} (" in repr(run)
        assert json.loads(json.dumps(run.to_dict()))["splits"] == run.results["splits"]
        assert run._repr_html_().count("<table") == 2
        assert not run.model().training
        with pytest.raises(ValueError, match="finished run"):
            clipmini.train(recipe, **{"training.seed": 3})


class TestEvaluation:
    def test_what_it_shows(self, tiny_folder, images):
        (images / "3.png").write_bytes(b"")
        evaluation = clipmini.evaluate(tiny_folder, images, max_skipped=0.1)
        assert isinstance(evaluation, Evaluation)
        assert len(repr(evaluation)) < 200
        assert repr(evaluation).startswith("<retrieval of ")
        answer = json.loads(json.dumps(evaluation.to_dict()))
        assert answer["num_skipped"] == 1
        assert answer["metrics"] == evaluation.results["metrics"]
        html = evaluation._repr_html_()
        assert "text to image R@1" in html
        assert "95 % interval" in html

    def test_the_report_goes_to_a_folder_given_as_text(self, tiny_folder, images, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        clipmini.evaluate(tiny_folder, images).save("~/report")
        assert (tmp_path / "report" / "report.html").is_file()

    def test_strict(self, tiny_folder, images):
        (images / "3.png").write_bytes(b"")
        with pytest.raises(ValueError, match=r"3\.png"):
            clipmini.evaluate(tiny_folder, images, strict=True)


def test_a_prepared_push_shows_its_files(pushable_folder):
    pushed = clipmini.push(pushable_folder, "org/clipmini", dry_run=True)
    assert set(pushed.to_dict()) == {"repo_id", "files"}
    assert repr(pushed) == f"<{len(pushed.sizes)} files for org/clipmini, not uploaded>"
    assert pushed._repr_html_().startswith("&lt;")


def test_a_model_below_the_home_folder(tiny_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(tiny_folder.parent))
    assert clipmini.load("~/model").encode_text("a cat").shape == (16,)
    assert clipmini.search("~/model", [Image.new("RGB", (9, 9))], "a cat")[0].score <= 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: clipmini.search("", ".", "a"), "'' is not a name. Name a model folder"),
        (lambda: clipmini.search(3, ".", "a"), "3 is not a name"),
        (lambda: clipmini.load(None), "None is not a name"),
        (lambda: clipmini.search("org/x", ".", None), "query None is not a text"),
        (lambda: clipmini.search("org/x", ".", "a", top="3"), "top=3 is not allowed"),
        (lambda: clipmini.classify("org/x", "a.png", [None]), "label None is not a text"),
        (lambda: clipmini.evaluate("org/x", ""), "data.source is empty"),
        (lambda: clipmini.train("demo", source=""), "data.source is empty"),
        (lambda: clipmini.train("demo", **{"lora.a.b": 3}), "lora.a.b has too many parts"),
    ],
)
def test_what_is_no_name_or_text_is_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
