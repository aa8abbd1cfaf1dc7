"""Train your own small CLIP, trust its numbers, ship it, and search with it."""

from importlib.util import find_spec
from pathlib import Path

if find_spec("clipmini.training") is None:  # Python has found the checkout before the installed package
    raise ImportError(
        "This clipmini is the folder of a checkout that is not installed, and lacks clipmini.training: run "
        "`pip install -e .` in the checkout, or start Python elsewhere."
    )

_METRICS = Path(__file__).parent / "evaluation" / "metrics"


def metric(name: str) -> str:
    """Return the folder of one of clipmini's metrics, for the `evaluate` library.

    Args:
        name: "image_text_retrieval" or "zero_shot_accuracy".

    Returns:
        An absolute path, which `evaluate.load` takes in any working directory.

    Raises:
        ValueError: there is no such metric.

    Example:
        >>> evaluate.load(clipmini.metric("image_text_retrieval"))
    """
    known = sorted(path.name for path in _METRICS.iterdir() if (path / f"{path.name}.py").is_file())
    if name not in known:
        raise ValueError(f"There is no metric {name!r}; use one of {', '.join(known)}.")
    return str(_METRICS / name)
