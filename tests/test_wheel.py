"""The wheel is a whole studio: installed into an empty environment and started in an empty folder, it answers with its pages."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import httpx
import pytest

from tests.conftest import PROJECT, free_port, wait_until

RESOURCES = ("templates", "static", "migrations", "samples", "alembic.ini")
"""What stands beside the packages in a checkout, and in `app/resources` of a wheel."""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of an environment that has the wheel, and the libraries of the one the tests run in."""
    place = tmp_path_factory.mktemp("wheel")
    source = place / "source"
    source.mkdir()
    for name in ("app", "worker", *RESOURCES, "pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        if (PROJECT / name).is_dir():  # a copy, so that nothing is left behind in the checkout
            shutil.copytree(PROJECT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(PROJECT / name, source / name)
    build = "from setuptools.build_meta import build_wheel; print(build_wheel('..'))"
    made = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True, check=True).stdout.split()[-1]
    environment = place / "venv"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python*/site-packages")
    (packages / "libraries.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("site-packages")))
    command = ["-m", "pip", "--quiet", "install", "--no-deps", "--no-index", "--target", str(packages), str(place / made)]
    subprocess.run([sys.executable, *command], capture_output=True, check=True)
    return environment / "bin" / "python"


@pytest.mark.long
def test_it_brings_all_that_it_needs(python: Path, tmp_path: Path):
    code = (
        "import app, worker, pathlib; from app import migrate; from app.datasets import samples; from app.settings import RESOURCES;"
        "here = pathlib.Path(app.__file__).parent; assert RESOURCES == here / 'resources';"
        "assert (pathlib.Path(worker.__file__).parent / 'scoring' / 'probe' / 'general.yaml').is_file();"
        "print(here, migrate.newest(), len(list(samples.FOLDER.iterdir())), len(list(RESOURCES.rglob('*.html'))))"
    )
    done = subprocess.run([python, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    here, newest, samples, pages = done.stdout.split()
    assert Path(here).is_relative_to(python.parents[1])
    assert newest == max(path.name[:4] for path in (PROJECT / "migrations" / "versions").glob("[0-9]*.py"))
    assert int(samples) == len(list((PROJECT / "samples").iterdir())) and int(pages) == len(list((PROJECT / "templates").rglob("*.html")))


@pytest.mark.long
@pytest.mark.studio
@pytest.mark.timeout(240)
def test_it_is_a_whole_studio(python: Path, tmp_path: Path):
    port, log = free_port(), tmp_path / "log"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    command = [python, "-m", "app.cli", "up", "--port", str(port), "--data-dir", str(tmp_path / "data")]
    (tmp_path / "empty").mkdir()
    with log.open("wb") as file:
        studio = subprocess.Popen(command, cwd=tmp_path / "empty", env=environment, stdout=file, stderr=file)
    try:

        def ready() -> bool:
            assert studio.poll() is None, log.read_text()[-3000:]
            try:
                return httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=5).status_code == 200
            except httpx.TransportError:
                return False

        wait_until(ready, what="the studio", log=log, seconds=180)
        page = httpx.get(f"http://127.0.0.1:{port}/sign-in", follow_redirects=True)
        (style,) = {part.split('"')[0] for part in page.text.split('href="') if "/luthier.css" in part.split('"')[0]}
        assert page.status_code == 200 and "color" in httpx.get(f"http://127.0.0.1:{port}{style}").text
    finally:
        studio.terminate()
        studio.wait(60)
