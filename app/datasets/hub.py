"""Datasets from the Hugging Face hub, by name: one split of a pinned commit, never a script.

    order ─→ a dataset, `reading` ─→ the data worker downloads its file and parses it like an upload

The hub's loading scripts are not run: only file types that our readers support are used. A split in several Parquet files is
concatenated by a limited child, row for row.
"""

from __future__ import annotations

import fnmatch
import json
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app import formats, queue
from app.datasets import readers
from app.errors import BadData, NotFound, StudioError, TooLarge, Unavailable
from app.kit import sandbox
from app.models import hub
from app.settings import get_settings
from app.tables import Dataset, User

OPERATION = "hub"
_PIECE = re.compile(r"-\d{5}-of-\d{5}")


class HubOrder(BaseModel):
    """Which rows of the hub to bring."""

    model_config = ConfigDict(extra="forbid")
    repo: str = Field(max_length=200, description="Its name there, owner/name.")
    revision: str | None = Field(default=None, max_length=200, description="Branch, tag or commit; the newest if omitted.")
    subset: str | None = Field(default=None, max_length=100, description="Which of its subsets (configurations), where it has several.")
    split: str = Field(default="train", max_length=60, description="Which of its parts.")
    file: str | None = Field(default=None, max_length=300, description="A file of the repository, where its name does not say the split.")
    name: str | None = Field(default=None, max_length=200)
    format: str | None = None


def order(session: Session, user: User, wish: HubOrder) -> Dataset:
    """A dataset whose download is enqueued. Raises BadField for an invalid repository name, Unavailable when offline."""
    hub.check_name(wish.repo, wish.revision)
    hub.must_be_allowed()
    if wish.format:
        formats.get(wish.format)
    origin = {"operation": OPERATION, **wish.model_dump(include={"repo", "revision", "subset", "split", "file"})}
    dataset = Dataset(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, name=(wish.name or wish.repo.rsplit("/", 1)[-1]).strip()[:200], version=1, origin=origin,
        format=wish.format, format_chosen=bool(wish.format), mapping={}, status="reading",
    )  # fmt: skip
    session.add(dataset)
    session.flush()
    queue.enqueue(session, queue.READ, dataset.id)
    session.refresh(dataset)
    return dataset


# In the data worker -------------------------------------------------------------------------------------------------------


def bring(origin: dict[str, Any], folder: Path, limits: sandbox.Limits, keep_going: Callable[[], bool]) -> tuple[Path, str, dict[str, Any]]:
    """The file of the requested split in `folder`, its name, and what was pinned: commit and license.

    Raises NotFound, Unavailable, BadData for a repository without a supported file, TooLarge.
    """
    with ThreadPoolExecutor(1, "hub") as thread:  # the lease is renewed while a large file is downloaded
        coming = thread.submit(_download, origin, folder)
        while not coming.done():
            try:
                coming.exception(timeout=1.0)
            except TimeoutError:
                if not keep_going():
                    coming.cancel()
                    raise sandbox.Killed("stopped", "It was stopped.") from None
        names, pinned = coming.result()
    if len(names) == 1:
        return folder / names[0], Path(names[0]).name, pinned
    out = folder / "rows.jsonl"
    payload = {"paths": [str(folder / name) for name in names], "out": str(out)}
    sandbox.run("app.datasets.hub:put_together", payload, limits, folder=folder, write=[folder], keep_going=keep_going)
    return out, f"{origin['split']}.jsonl", pinned


def put_together(payload: dict[str, Any], say: Any) -> int:
    """In a limited child: concatenate the rows of several files into one JSON Lines file. Returns their number."""
    count = 0
    with Path(payload["out"]).open("w", encoding="utf-8", errors="surrogatepass") as out:
        for path in payload["paths"]:
            for raw in readers.read(Path(path), Path(path).name):
                if raw.row is not None:
                    out.write(json.dumps(raw.row, ensure_ascii=False) + "\n")
                    count += 1
    return count


def _download(origin: dict[str, Any], folder: Path) -> tuple[list[str], dict[str, Any]]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (  # type: ignore[attr-defined]  # HTTPError is re-exported
        GatedRepoError,
        HTTPError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    api, repo = HfApi(), origin["repo"]
    try:
        facts = api.dataset_info(repo, revision=origin["revision"], files_metadata=True, timeout=15)
        sizes = {item.rfilename: item.size or 0 for item in facts.siblings or []}
        card = facts.card_data.to_dict() if facts.card_data else {}
        names = choose(sizes, repo, origin["split"], origin["file"], origin.get("subset"), card.get("configs"))
        for name in names:
            api.hf_hub_download(repo, name, repo_type="dataset", revision=facts.sha, local_dir=folder)
    except GatedRepoError:
        raise Unavailable(f"{repo} asks for its terms to be accepted first.", hint="Accept them there, then set HF_TOKEN.") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise NotFound(f"The hub has no dataset {repo} (or not that revision).", hint="Check the name.", param="repo") from None
    except (OfflineModeIsEnabled, HTTPError, OSError) as error:
        raise Unavailable(
            f"The hub cannot be reached ({type(error).__name__}).",
            hint="Check the network, or upload the file itself.",
            code="hub_unreachable",
        ) from error
    return names, {"revision": facts.sha, "files": names, "license": str(card["license"])[:40] if card.get("license") else None}


def choose(sizes: dict[str, int], repo: str, split: str, file: str | None, subset: str | None = None, configs: Any = None) -> list[str]:
    """The file, or the files, that contain a split. `configs` are the subsets in the repository's card.

    Raises BadData that lists what there is, TooLarge beyond the upload limit.
    """
    known = sorted(name for name in sizes if _readable(name))
    if file is not None and file not in known:
        raise BadData(f"{repo} has no data file {file[:120]!r}.", hint=_offer(known), param="file")
    if file is not None:
        return _within_limit([file], sizes)
    if found := _as_the_card_says(known, repo, split, subset, configs):
        return _within_limit(found, sizes)
    if subset:
        inside = [name for name in known if re.search(rf"(^|[/_.-]){re.escape(subset)}([/_.-]|$)", name, re.IGNORECASE)]
        if not inside:
            raise BadData(f"{repo} has no subset “{subset}”.", hint=_offer(known), param="subset")
        known = inside
    named = [name for name in known if re.search(rf"(^|[/_.-]){re.escape(split)}([/_.-]|$)", name, re.IGNORECASE)]
    found = named or (known if len(known) == 1 else [])
    if len({_PIECE.sub("", name) for name in found}) > 1 and len(whole := [name for name in found if "/" not in name]) == 1:
        found = whole
    if not found or len({_PIECE.sub("", name) for name in found}) > 1:
        what = "several files" if found else "no file"
        raise BadData(f"{repo} has {what} for the split “{split}”.", hint=_offer(found or known), param="split")
    return _within_limit(found, sizes)


def _as_the_card_says(known: list[str], repo: str, split: str, subset: str | None, configs: Any) -> list[str]:
    """The files that a card names for a subset and a split (https://huggingface.co/docs/hub/datasets-manual-configuration); none
    where it names none. Raises BadData where it names several subsets and none was chosen, or others than the chosen one."""
    named = {str(entry.get("config_name")): entry for entry in configs or () if isinstance(entry, dict) and entry.get("data_files")}
    if not named:
        return []
    default = next((name for name, entry in named.items() if name == "default" or entry.get("default")), None)
    chosen = subset or default or (next(iter(named)) if len(named) == 1 else None)
    if chosen not in named:
        what = f"no subset “{subset}”" if subset else "several subsets"
        raise BadData(f"{repo} has {what}.", hint=f"Name one with subset: {', '.join(list(named)[:12])}.", param="subset")
    parts = named[chosen]["data_files"]
    parts = parts if isinstance(parts, list) else [parts]
    patterns: list[str] = []
    for part in parts:
        of_split, path = (part.get("split"), part.get("path")) if isinstance(part, dict) else ("train", part)
        if of_split == split:
            patterns += [str(pattern) for pattern in (path if isinstance(path, list) else [path])]
    return [name for name in known if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _within_limit(found: list[str], sizes: dict[str, int]) -> list[str]:
    total, limit = sum(sizes[name] for name in found), get_settings().upload_limit_bytes
    if total > limit:
        raise TooLarge(
            f"This split has {total:,} bytes; the limit is {limit:,}.", hint="Choose another, or raise LUTHIER_UPLOAD_LIMIT_BYTES."
        )
    return found


def _readable(name: str) -> bool:
    if ".." in name or name.startswith(("/", ".")) or Path(name).suffix in (".md", ".zip") or Path(name).name == "dataset_infos.json":
        return False
    try:
        readers.kind_of(name)
    except StudioError:
        return False
    return True


def _offer(names: list[str]) -> str:
    return f"Name one with file: {', '.join(names[:8])}{' …' if len(names) > 8 else ''}." if names else "It holds no file our readers take."
