"""Downloads models from the Hugging Face hub, where it can be reached: only known files, a pinned commit, a limit on size."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import BadField, DiskFull, NotFound, TooLarge, Unavailable, Unsupported
from app.models import hub_token, import_checks
from app.settings import get_settings

LARGEST = 200 * 2**30
"""Maximum bytes of one model."""

_REPO = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")


def check_name(repo: str, revision: str | None) -> None:
    """Raises BadField for what is no valid repository name; a path or a URL never passes."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise BadField(f"{repo[:80]!r} is no name of a hub model.", hint="It looks like `owner/name`.", param="repo")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise BadField(f"{revision[:80]!r} is no branch, tag or commit.", hint="Leave it empty for the newest.", param="revision")


def must_be_allowed() -> None:
    """Raises Unavailable when the studio is configured to stay offline."""
    if get_settings().offline:
        raise Unavailable(
            "The studio is set to stay offline, so the hub is not asked.",
            hint="Unset LUTHIER_OFFLINE, or add a starter model or a local folder.",
            code="offline",
        )


def download(repo: str, revision: str | None, into: Path, beat: Callable[[float], None]) -> dict[str, Any]:
    """Fetch the allowed files of one commit into a folder. Returns `{"revision": commit, "license": name or None}`.

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
        files = choose({item.rfilename: item.size or 0 for item in facts.siblings or []}, repo)
        _need_room(into, sum(files.values()))
        done = 0
        for name, size in files.items():
            api.hf_hub_download(repo, name, revision=facts.sha, local_dir=into)
            done += size
            beat(0.85 * done / max(sum(files.values()), 1))
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
    shutil.rmtree(into / ".cache", ignore_errors=True)
    card = facts.card_data.to_dict() if facts.card_data else {}
    return {"revision": facts.sha, "license": str(card.get("license"))[:40] if card.get("license") else None}


def choose(sizes: dict[str, int], repo: str) -> dict[str, int]:
    """The files worth fetching: those on the allow-list, weights as safetensors only. Raises Unsupported or TooLarge."""
    files = {name: size for name, size in sizes.items() if import_checks.wanted(name)}
    if not any(name.endswith(".safetensors") for name in files):
        raise Unsupported(f"{repo} holds no safetensors.", hint="Choose a model that does; pickled weights are not opened.", param="repo")
    total = sum(files.values())
    if total > LARGEST:
        raise TooLarge(f"{repo} has {total / 1e9:.0f} GB; the limit is {LARGEST / 1e9:.0f} GB.", hint="Choose a smaller model.")
    return files


def _need_room(into: Path, needed: int) -> None:
    free = shutil.disk_usage(into.parent).free
    if free < 2.2 * needed:  # once as downloaded, once as kept
        raise DiskFull(
            f"The model needs {2.2 * needed / 1e9:.1f} GB while it is fetched, and {free / 1e9:.1f} GB are free.",
            hint="Free some space.",
        )
