"""Train your own small CLIP, trust its numbers, ship it, and search with it."""

from importlib.util import find_spec

if find_spec("clipmini.training") is None:  # the folder of a checkout stands before what is installed
    raise ImportError(
        "This clipmini is the folder of a checkout that is not installed, and lacks clipmini.training: run "
        "`pip install -e .` in the checkout, or start Python elsewhere."
    )
