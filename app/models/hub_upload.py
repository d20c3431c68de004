"""Uploads a finished export to the Hugging Face hub, as a child process: `python -m app.models.hub_upload ORDER ANSWER`.

Files are uploaded one by one and named by one commit at the end, so a repository never shows half of an export. The hub keeps what was
uploaded before an interruption and asks for the rest alone, so a second upload continues the first.

A token is never in the database: it is in a file with mode 0600 from the request until the upload ends.
"""

from __future__ import annotations

import json
import os
import re
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from app.errors import BadData, BadField, Conflict, Forbidden, NotSignedIn, StudioError, TooLarge, Unavailable
from app.kit import child_process
from app.languages import gettext, mark
from app.models import hub
from app.settings import get_settings

_TOKEN = re.compile(r"[\x21-\x7e]{3,500}")
SECONDS = 24 * 3600
"""Time limit of one upload."""


def upload(export_id: uuid.UUID, folder: Path, order: dict[str, Any], work: Path, beat: Callable[[], None]) -> dict[str, str]:
    """Upload the files of `order` (`{"repo", "private", "files"}`) in `folder`; returns `{"url", "commit"}`. The child keeps its share in
    `progress.json` of `work`. Raises StudioError, and whatever `beat` raises."""
    hub.must_be_allowed()
    asked, answer = work / "order.json", work / "answer.json"
    asked.write_text(json.dumps({**order, "folder": str(folder), "progress": str(work / "progress.json")}))
    left_out = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("LUTHIER_") and k not in left_out}
    environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"HF_HUB_DISABLE_XET": "1"}  # by Git LFS, whose errors have statuses, and which is tested here
    token = token_file(export_id)
    if token.is_file():
        environment |= {"HF_TOKEN": token.read_text(), "HF_HOME": str(work)}  # so that no other account's token is near
    code, said = child_process.run([sys.executable, "-m", "app.models.hub_upload", str(asked), str(answer)], environment, beat, SECONDS)
    try:
        found: dict[str, str] = json.loads(answer.read_text())
    except (OSError, ValueError):
        raise BadData(f"The upload ended with status {code}. {said.strip()[-300:]}", hint="Push it again.", code="upload_ended") from None
    if "error" in found:
        raise BadData(found["error"], hint=found["hint"], code=found["code"])
    return found


# The token ------------------------------------------------------------------------------------------------------------


def token_file(export_id: uuid.UUID) -> Path:
    return get_settings().data_dir / "exports" / f".{export_id}.token"


def check_token(token: str) -> None:
    """Raises BadField for what is no token, Unavailable where the export worker may be on a machine with another data folder."""
    if not _TOKEN.fullmatch(token):
        raise BadField(gettext("That is no token of the hub."), hint=gettext("It is one word, as hf_…."), param="token")
    if get_settings().storage_url:
        raise Unavailable(
            gettext("A token of one's own does not reach the export worker of a studio with an object storage."),
            hint=gettext("Let an admin push with the worker's own token (HF_TOKEN), or download the files and push them from there."),
            param="token",
            code="token_stays_here",
        )


def keep_token(export_id: uuid.UUID, token: str) -> None:
    get_settings().folder("exports")
    handle = os.open(token_file(export_id), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(handle, "w") as file:
        file.write(token)


def forget_token(export_id: uuid.UUID) -> None:
    token_file(export_id).unlink(missing_ok=True)


# The child ------------------------------------------------------------------------------------------------------------


def main(arguments: list[str]) -> None:
    order, answer = (Path(a) for a in arguments)
    asked = json.loads(order.read_text())
    try:
        found = send(Path(asked["folder"]), asked["files"], asked["repo"], asked["private"], _reporter(Path(asked["progress"])))
    except StudioError as error:
        found = {"error": error.message, "hint": error.hint, "code": error.code}
    answer.write_text(json.dumps(found))


def _reporter(path: Path) -> Callable[[float], None]:
    def report(share: float) -> None:
        fresh = path.with_suffix(".new")
        fresh.write_text(json.dumps({"progress": round(share, 4), "stage": mark("Uploading to the hub")}))
        os.replace(fresh, path)

    return report


def send(folder: Path, files: list[str], repo: str, private: bool, report: Callable[[float], None]) -> dict[str, str]:
    """Create the repository where it does not exist, upload the files and commit them. Raises StudioError."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api, sizes = HfApi(), {name: (folder / name).stat().st_size for name in files}
    try:
        url = str(api.create_repo(repo, private=private, exist_ok=True))
        if private and not api.model_info(repo).private:
            raise Conflict(f"{repo} is public on the hub.", hint="Choose another repository, or push it as public.", code="hub_public")
        operations, done = [], 0
        for name in files:
            operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name)
            api.preupload_lfs_files(repo, [operation])
            operations.append(operation)
            done += sizes[name]
            report(0.99 * done / max(1, sum(sizes.values())))
        commit = api.create_commit(repo, operations, commit_message="Export from Luthier")
    except StudioError:
        raise
    except Exception as error:  # of the HTTP library in use, and of the client, which wraps it
        raise in_words(error, repo) from error
    return {"url": url, "commit": commit.oid}


def in_words(error: BaseException, repo: str) -> StudioError:
    """What went wrong at the hub, and what to do about it."""
    status = next((status for one in _causes(error) if (status := getattr(getattr(one, "response", None), "status_code", None))), None)
    said = next((text for one in _causes(error) if (text := getattr(one, "server_message", None))), None) or ""
    if status == 401:
        return NotSignedIn("The hub does not accept the token.", hint="Make a token with write permission there.", code="hub_unauthorized")
    if status in (403, 404):
        return Forbidden(
            f"The token may not write to {repo}. {said[:200]}".strip(),
            hint="Give it write permission, or change the name.",
            code="hub_forbidden",
        )
    if status == 413:
        return TooLarge(f"A file is larger than the hub takes. {said[:200]}".strip(), hint="Export a smaller type.", code="hub_too_large")
    if status is not None:
        return Unavailable(f"The hub answered with status {status}. {said[:200]}".strip(), hint=AGAIN, code="hub_refused")
    return Unavailable(f"The upload to the hub broke off: {type(error).__name__}: {str(error)[:200]}", hint=AGAIN, code="hub_unreachable")


AGAIN = "Push it again: what was uploaded is not sent a second time."


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


if __name__ == "__main__":
    main(sys.argv[1:])
