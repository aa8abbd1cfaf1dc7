"""Packages that slow tests want besides those that are installed: from PyPI, once, into a folder of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


def cache_folder():
    """The folder that keeps what was downloaded: CLIPMINI_TEST_CACHE, or one in the user's cache."""
    folder = Path(os.environ.get("CLIPMINI_TEST_CACHE", "~/.cache/clipmini-tests")).expanduser()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def pip(*arguments):
    """Run pip; where it fails the test does, unless CLIPMINI_OFFLINE says that there is no network."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        end = pytest.skip if os.environ.get("CLIPMINI_OFFLINE") else pytest.fail
        end(f"pip could not do it: {result.stderr.strip().splitlines()[-1]}")


def source_archive(name, version):
    """The source archive of a package: in the cache, or from PyPI."""
    archive = cache_folder() / f"{name}-{version}.tar.gz"
    if not archive.exists():
        options = ("--no-deps", "--no-build-isolation", "--no-binary", ":all:", "--dest", cache_folder())
        pip("download", *options, f"{name}=={version}")
    return archive
