"""Put the model card's template, which lies at the root of a checkout, into the wheel; all else is in pyproject."""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithTemplate(build_py):
    """Build as setuptools does, and copy the template beside the code that reads it."""

    def run(self) -> None:
        """Copy packages, then the template; an editable install reads it where it lies."""
        super().run()
        if not self.editable_mode:
            self.copy_file("model_card.md", str(Path(self.build_lib, "clipmini", "publishing", "model_card.md")))


setup(cmdclass={"build_py": BuildWithTemplate})
