"""The studio's token of the Hugging Face hub, for models whose terms were accepted there: a file with mode 0600, never the database."""

from __future__ import annotations

import os
import re
from pathlib import Path

from app.errors import BadField, Conflict
from app.kit import secret
from app.languages import gettext

_TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,200}")


def path() -> Path:
    return secret.folder() / "hub.token"


def read() -> str | None:
    """The saved token, else that of the environment (HF_TOKEN)."""
    try:
        return path().read_text().strip() or None
    except OSError:
        return os.environ.get("HF_TOKEN") or None


def keep(token: str) -> None:
    """Raises BadField for what is no token of the hub, Conflict where the studio's secrets are given from outside."""
    _refuse_given()
    if not _TOKEN.fullmatch(token.strip()):
        raise BadField(
            gettext("That is no token of the hub."),
            hint=gettext("It begins with hf_; make one at huggingface.co/settings/tokens."),
            param="token",
        )
    draft = path().with_suffix(f".{os.getpid()}")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(token.strip())
    draft.rename(path())


def forget() -> None:
    """Raises Conflict where the studio's secrets are given from outside."""
    _refuse_given()
    path().unlink(missing_ok=True)


def _refuse_given() -> None:
    if secret.are_given():
        raise Conflict(
            gettext("The secrets of this studio are given from outside."),
            hint=gettext(
                "Put the token into hub.token of LUTHIER_SECRETS_DIR, or set HF_TOKEN for the web process, data, import and export."
            ),
        )
