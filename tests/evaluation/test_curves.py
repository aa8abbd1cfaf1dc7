import pytest
from matplotlib.axes import Axes
from PIL import Image

from clipmini.evaluation.curves import draw_curves

STAGE_ONE = [
    {"step": 1, "epoch": 0.5, "loss": 4.0, "learning_rate": 2e-3, "logit_scale": 10.0},
    {"step": 2, "epoch": 1.0, "loss": 3.0, "learning_rate": 1e-3, "logit_scale": 20.0},
    {"step": 2, "epoch": 1.0, "eval_text_to_image_r1": 0.1, "eval_image_to_text_r5": 0.5},
    {"step": 4, "epoch": 2.0, "eval_text_to_image_r1": 0.2, "eval_image_to_text_r5": 0.6},
    {"step": 4, "epoch": 2.0, "train_runtime": 9.0},
]
STAGE_TWO = [{"step": 1, "epoch": 1.0, "loss": 2.0}, {"step": 1, "epoch": 1.0, "eval_text_to_image_r1": 0.3}]


@pytest.fixture
def drawn(monkeypatch):
    """The points of each curve, the places of the lines between stages, and what is written beside them."""
    calls = {"curves": [], "labels": [], "borders": set(), "names": []}

    def plot(self, x, y, **options):
        calls["curves"].append((list(x), list(y)))
        calls["labels"] += [options["label"]] if options["label"] else []
        return original(self, x, y, **options)

    original = Axes.plot
    monkeypatch.setattr(Axes, "plot", plot)
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **options: calls["borders"].add(x))
    monkeypatch.setattr(
        Axes, "annotate", lambda self, text, place, **options: calls["names"].append((text.strip(), place[0]))
    )
    return calls


def test_one_stage(drawn, tmp_path):
    draw_curves({"training": STAGE_ONE}, tmp_path / "curves.png")
    assert drawn["curves"] == [
        ([0.5, 1.0], [4.0, 3.0]),
        ([1.0, 2.0], [10.0, 20.0]),
        ([1.0, 2.0], [50.0, 60.0]),
        ([0.5, 1.0], [0.1, 0.05]),
        ([0.5, 1.0], [2.0, 1.0]),
    ]
    assert drawn["borders"] == set()
    assert drawn["names"] == []
    with Image.open(tmp_path / "curves.png") as image:
        assert image.format == "PNG"
        assert image.width > 1000
    assert [file.name for file in tmp_path.iterdir()] == ["curves.png"]


def test_stages_are_laid_one_after_the_other(drawn, tmp_path):
    draw_curves({"heads": STAGE_ONE, "towers": STAGE_TWO}, tmp_path / "curves.png")
    assert ([3.0], [2.0]) in drawn["curves"]  # loss
    assert ([3.0], [30.0]) in drawn["curves"]  # recall
    assert drawn["labels"] == ["text to image R@1", "image to text R@5"]  # once, whatever the number of stages
    assert drawn["borders"] == {2.0}
    assert drawn["names"] == [("heads", 0.0), ("towers", 2.0)]


def test_a_run_that_logged_nothing_is_drawn_as_well(tmp_path):
    draw_curves({"heads": [], "towers": []}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000
