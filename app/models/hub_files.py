"""One file of a hub repository, downloaded so that it continues where it broke off, in this attempt or a later one.

The hub's own client writes each download under a name of its own and removes it when it fails, so a large file begins again after every
break. Here it grows under `<name>.part`, and is renamed once its size and SHA-256 are those that the hub told.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from app.errors import Unavailable
from app.kit import manifest

PART = ".part"
TRIES = 6
"""Breaks in a row, without a byte between them, after which a download is given up."""
SILENT_SECONDS = 30.0
"""A connection that brings nothing for so long is taken to be broken."""
MAX_WAIT_SECONDS = 20.0


class HubFile(NamedTuple):
    """A file of a commit. Small ones have no SHA-256 there."""

    repo: str
    revision: str
    name: str
    bytes: int
    sha256: str | None


def have(into: Path, file: HubFile) -> int:
    """Bytes of a file that are in the folder already."""
    for path in (into / file.name, into / f"{file.name}{PART}"):
        if path.is_file():
            return min(path.stat().st_size, file.bytes)
    return 0


def bring(file: HubFile, into: Path, token: str | None, told: Callable[[int], None]) -> None:
    """Download a file into a folder, whatever of it is there already. `told` gets the bytes of it so far, also while nothing comes; what
    it raises ends the download, which can be continued. Raises Unavailable for other bytes than announced, and the client's errors."""
    path, part = into / file.name, into / f"{file.name}{PART}"
    if path.is_file() and path.stat().st_size == file.bytes:
        return told(file.bytes)
    path.parent.mkdir(parents=True, exist_ok=True)
    breaks = 0
    while (before := have(into, file)) < file.bytes or not part.is_file():
        try:
            _receive(file, part, token, told)
        except _breaks() as error:
            if _final(error):
                raise
        breaks = 0 if have(into, file) > before else breaks + 1
        if breaks == TRIES:
            raise Unavailable(
                f"The download of {file.name} from {file.repo} broke off {TRIES} times at {before:,} of {file.bytes:,} bytes.",
                hint="Try again: what has come is kept.",
                code="hub_unreachable",
            )
        _wait(breaks, lambda: told(have(into, file)))
    if part.stat().st_size != file.bytes or (file.sha256 and manifest.sha256_of(part, lambda: told(file.bytes)) != file.sha256):
        part.unlink()
        raise Unavailable(f"{file.name} of {file.repo} came with other bytes than the hub announced.", hint="Try again.", code="wrong_hash")
    part.rename(path)


def _receive(file: HubFile, part: Path, token: str | None, told: Callable[[int], None]) -> None:
    """One request for the rest of a file, written behind what is there."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

    done = part.stat().st_size if part.is_file() else 0
    headers = {**build_hf_headers(token=token or False), "accept-encoding": "identity"}
    if done:
        headers["range"] = f"bytes={done}-"
    url = hf_hub_url(file.repo, file.name, revision=file.revision)
    with get_session().stream("GET", url, headers=headers, follow_redirects=True, timeout=SILENT_SECONDS) as answer:
        if answer.status_code >= 400:
            answer.read()
        hf_raise_for_status(answer)
        goes_on = answer.status_code == 206 and answer.headers.get("content-range", "").startswith(f"bytes {done}-")
        with part.open("ab" if goes_on else "wb") as out:
            for piece in answer.iter_raw():  # as it comes: pieces of a fixed size would lose what came before a break
                out.write(piece)
                if out.tell() > file.bytes:
                    return
                told(out.tell())


def _breaks() -> type[Exception]:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # of the HTTP library in use

    found: type[Exception] = HTTPError
    return found


def _final(error: Exception) -> bool:
    """Whether asking again would get the same answer."""
    answer = getattr(error, "response", None)
    return answer is not None and 400 <= answer.status_code < 500 and answer.status_code not in (408, 416, 429)


def _wait(breaks: int, told: Callable[[], None]) -> None:
    """Wait longer with every break in a row; none after progress."""
    until = time.monotonic() + (min(2.0**breaks, MAX_WAIT_SECONDS) if breaks else 0)
    while time.monotonic() < until:
        told()
        time.sleep(min(1.0, max(until - time.monotonic(), 0)))
