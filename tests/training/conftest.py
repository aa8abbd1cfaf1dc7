"""What the tests of training share."""

import os

import datasets
import pytest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    if "CLIPMINI_CACHE" not in os.environ:
        monkeypatch.setenv("CLIPMINI_CACHE", str(tmp_path_factory.mktemp("clipmini")))
