"""What pyproject.toml cannot say: a wheel carries the folders that stand beside the packages in a checkout."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

RESOURCES = ("templates", "static", "migrations", "samples", "alembic.ini")


class BuildWithResources(build_py):
    """Puts them into `app/resources`, where `app.settings.RESOURCES` looks first. An editable installation uses the checkout's own."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        into = Path(self.build_lib) / "app" / "resources"
        shutil.rmtree(into, ignore_errors=True)
        into.mkdir(parents=True)
        for name in RESOURCES:
            if Path(name).is_dir():
                shutil.copytree(name, into / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(name, into / name)


setup(cmdclass={"build_py": BuildWithResources})
