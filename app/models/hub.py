"""Downloads models from the Hugging Face hub, where it can be reached: only known files, a pinned commit, a limit on size.
What broke off continues (`hub_files.py`)."""

from __future__ import annotations

import contextlib
import fcntl
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.errors import BadField, DiskFull, NotFound, TooLarge, Unavailable, Unsupported
from app.languages import gettext
from app.models import hub_files, hub_token, import_checks
from app.models.hub_files import HubFile
from app.settings import get_settings

LARGEST = 200 * 2**30
"""Maximum bytes of one model."""

BEAT_SECONDS = 2.0

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def check_name(repo: str, revision: str | None) -> None:
    """Raises BadField for what is no valid repository name; a path or a URL never passes."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise BadField(
            gettext("%(repo)s is no name of a hub model.", repo=repr(repo[:80])), hint=gettext("It looks like `owner/name`."), param="repo"
        )
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BadField(
            gettext("%(revision)s is no branch, tag or commit.", revision=repr(revision[:80])),
            hint=gettext("Leave it empty for the newest."),
            param="revision",
        )


def must_be_allowed() -> None:
    """Raises Unavailable when the studio is configured to stay offline."""
    if get_settings().offline:
        raise Unavailable(
            gettext("The studio is set to stay offline, so the hub is not asked."),
            hint=gettext("Unset LUTHIER_OFFLINE, or add a starter model or a local folder."),
            code="offline",
        )


def downloads(model_id: uuid.UUID) -> Path:
    """The folder into which a model is downloaded. It is kept when that fails, so that another attempt continues it."""
    return get_settings().folder("tmp") / f"hub-{model_id}"


def download(repo: str, revision: str | None, into: Path, beat: Callable[[float], None]) -> dict[str, Any]:
    """Fetch the allowed files of one commit into a folder, which may hold a part of them. Returns `{"revision": commit, "license": name
    or None}`. `beat` gets the share that is done, up to 0.85, every few seconds.

    Raises Unavailable when the hub cannot be reached, NotFound, Unsupported for a repository without safetensors, TooLarge and
    DiskFull.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # it is re-exported
        GatedRepoError,
        HTTPError,  # of the HTTP library in use, whose name has changed before
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    must_be_allowed()
    api = HfApi(token=hub_token.read() or False)
    try:
        facts = api.model_info(repo, revision=revision, files_metadata=True, timeout=15)
        sizes = choose({item.rfilename: item.size or 0 for item in facts.siblings or []}, repo)
        digests = {item.rfilename: item.lfs.sha256 if item.lfs else None for item in facts.siblings or []}
        files = [HubFile(repo, str(facts.sha), name, size, digests[name]) for name, size in sizes.items()]
        with _alone(into, lambda: beat(0.0)):
            _only_of(into, str(facts.sha))
            _need_room(into, sum(sizes.values()), sum(hub_files.have(into, file) for file in files))
            share = _Share(beat, sum(sizes.values()))
            for file in files:
                hub_files.bring(file, into, hub_token.read() or None, share.of_file)
                share.done += file.bytes
    except GatedRepoError:
        raise Unavailable(
            f"{repo} asks for its terms to be accepted on the hub first.",
            hint="Accept them there, and save a token under Models, Hugging Face Hub.",
        ) from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise NotFound(f"The hub has no model {repo} (or not that revision).", hint="Check the name.", param="repo") from None
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        if isinstance(error, OSError) and error.errno == 28:
            raise DiskFull(f"The disk filled up while {repo} was fetched.", hint="Free some space and try again.") from error
        raise Unavailable(
            f"The hub cannot be reached ({type(error).__name__}).",
            hint="Check the network, or add a starter model or a local folder; those need no hub.",
            code="hub_unreachable",
        ) from error
    card = facts.card_data.to_dict() if facts.card_data else {}
    return {"revision": facts.sha, "license": str(card.get("license"))[:40] if card.get("license") else None}


class _Share:
    """Turns the bytes of the file at hand into the share of all, told every few seconds: it renews a lease."""

    def __init__(self, beat: Callable[[float], None], total: int) -> None:
        self.beat, self.total, self.done, self.told_at = beat, max(total, 1), 0, -BEAT_SECONDS

    def of_file(self, count: int) -> None:
        if time.monotonic() - self.told_at >= BEAT_SECONDS:
            self.told_at = time.monotonic()
            self.beat(0.85 * (self.done + count) / self.total)


@contextlib.contextmanager
def _alone(into: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Within this context no other process downloads into the folder: one whose lease has passed writes until it notices."""
    into.mkdir(parents=True, exist_ok=True, mode=0o700)
    with (into / ".lock").open("w") as lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(1.0)
        yield


def _only_of(into: Path, commit: str) -> None:
    """Remove what an earlier attempt downloaded of another commit."""
    note = into / ".commit"
    if not note.is_file() or note.read_text() != commit:
        for path in into.iterdir():
            if path.name != ".lock":
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        note.write_text(commit)


def choose(sizes: dict[str, int], repo: str) -> dict[str, int]:
    """The files worth fetching: those on the allow-list, weights as safetensors only. Raises Unsupported or TooLarge."""
    files = {name: size for name, size in sizes.items() if import_checks.wanted(name)}
    if not any(name.endswith(".safetensors") for name in files):
        raise Unsupported(f"{repo} holds no safetensors.", hint="Choose a model that does; pickled weights are not opened.", param="repo")
    total = sum(files.values())
    if total > LARGEST:
        raise TooLarge(f"{repo} has {total / 1e9:.0f} GB; the limit is {LARGEST / 1e9:.0f} GB.", hint="Choose a smaller model.")
    return files


def _need_room(into: Path, needed: int, there: int) -> None:
    """Raises DiskFull where the disk has no room for `needed` bytes twice, `there` of which have come already."""
    free = shutil.disk_usage(into).free + there
    if free < 2.2 * needed:  # once as downloaded, once as kept
        raise DiskFull(
            f"The model needs {2.2 * needed / 1e9:.1f} GB while it is fetched, and {free / 1e9:.1f} GB are free.",
            hint="Free some space.",
        )
