"""Wheels as carriers of model weights: fetched by pip in a process of its own, checked by SHA-256, and read without being installed."""

from __future__ import annotations

import importlib.util
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from app.errors import BadData, Unavailable
from app.kit import child_process, manifest
from app.languages import gettext
from app.settings import get_settings

Report = Callable[[float], None]
"""Called with the fraction that is done, 0 to 1. May raise to stop the work."""


class Wheel(NamedTuple):
    """One wheel, pinned. `bytes` is its size, for the progress bar and as a limit."""

    requirement: str
    filename: str
    sha256: str
    bytes: int


def fetch(wheel: Wheel, work: Path, report: Report) -> Path:
    """The wheel's file: from the folder `import`, if somebody put it there, else fetched by pip."""
    by_hand = get_settings().data_dir / "import" / wheel.filename
    path = by_hand if by_hand.is_file() else _download(wheel, work, report)
    if manifest.sha256_of(path) != wheel.sha256:
        raise BadData(
            gettext("%(file)s is not the file that Luthier was made with (its SHA-256 differs).", file=wheel.filename),
            hint=gettext("Delete it and try again; if it comes again, do not use that package index."),
            code="wrong_hash",
        )
    report(1.0)
    return path


def _download(wheel: Wheel, work: Path, report: Report) -> Path:
    if get_settings().offline:
        raise Unavailable(
            gettext("The studio is set to stay offline, so %(wheel)s was not fetched.", wheel=wheel.requirement),
            hint=gettext(
                "Unset LUTHIER_OFFLINE, or put %(file)s into %(folder)s.", file=wheel.filename, folder=get_settings().data_dir / "import"
            ),
            code="offline",
        )
    if importlib.util.find_spec("pip") is None:
        raise Unavailable(
            gettext("This Python has no pip, which fetches the starter models."),
            hint=gettext(
                "Run `%(python)s -m ensurepip`, or put %(file)s into %(folder)s.",
                python=sys.executable,
                file=wheel.filename,
                folder=get_settings().data_dir / "import",
            ),
        )
    wishes = work / f"{wheel.filename}.txt"
    wishes.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--require-hashes", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--timeout=20", "-r", str(wishes), "-d", str(work)]
    scratch = work / "pip"
    scratch.mkdir(exist_ok=True)
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LUTHIER_")} | {"TMPDIR": str(scratch)}

    def beat() -> None:
        report(min(0.95, sum(f.stat().st_size for f in work.rglob("*") if f.is_file()) / max(wheel.bytes, 1)))

    code, said = child_process.run(command, environment, beat, seconds=1800)
    path = work / wheel.filename
    if code != 0 or not path.is_file():
        if "DO NOT MATCH THE HASHES" in said:
            raise BadData(
                gettext("The package index offers another %(file)s than the pinned one.", file=wheel.filename),
                hint=gettext("Do not use that index."),
                code="wrong_hash",
            )
        last = next((line for line in reversed(said.splitlines()) if line.startswith("ERROR")), said.strip()[-300:])
        raise Unavailable(
            gettext("The download of %(wheel)s failed. %(error)s", wheel=wheel.requirement, error=last[:300]),
            hint=gettext(
                "Check the network and try again, or put %(file)s into %(folder)s.",
                file=wheel.filename,
                folder=get_settings().data_dir / "import",
            ),
        )
    return path


def member(wheels: list[Path], name: str) -> bytes:
    """A small member of one of the wheels."""
    for path in wheels:
        with zipfile.ZipFile(path) as archive:
            if name in archive.namelist() and archive.getinfo(name).file_size <= 4 * 2**20:
                return archive.read(name)
    raise BadData(gettext("The wheel does not hold %(name)s.", name=name), hint=gettext("Report this: the pinned wheel has changed."))


def extract(archive: zipfile.ZipFile, name: str, target: Path, limit: int) -> None:
    """Write one member to `target`, stopping at `limit` bytes: the size in the archive's directory is not trusted.

    Names are never joined to a path: the caller chose `target`.
    """
    done = 0
    with archive.open(name) as source, target.open("ab") as out:
        while piece := source.read(2**20):
            done += len(piece)
            if done > limit:
                raise BadData(
                    f"{name[:120]} unpacks to more than {limit} bytes.", hint="The wheel is not what it claims to be; it was not used."
                )
            out.write(piece)
