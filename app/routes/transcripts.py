"""Saved conversations: a title, a link, and a transcript to download."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Form, Query
from fastapi.responses import RedirectResponse, Response

from app.db import Db
from app.errors import BadField
from app.inference import playground, transcript
from app.kit.json_safe import storable
from app.languages import gettext
from app.web.auth import CurrentUser

pages = APIRouter()


@pages.post("/playground/{exchange_id:uuid}/save")
def save(session: Db, user: CurrentUser, exchange_id: uuid.UUID, title: Annotated[str, Form(max_length=200)] = "") -> Response:
    """Set the title under which the playground lists a conversation first; an empty title removes it from the list."""
    playground.get(session, user, exchange_id).title = storable(" ".join(title.split())) or None
    return RedirectResponse(f"/playground/{exchange_id}", status_code=303)


@pages.get("/playground/{exchange_id:uuid}/export")
def export_it(session: Db, user: CurrentUser, exchange_id: uuid.UUID, format: Annotated[str, Query()] = "jsonl") -> Response:
    thread = playground.thread(session, user, exchange_id)
    if format not in ("jsonl", "md"):
        raise BadField(gettext("A comparison is exported as jsonl or md."), param="format")
    title = thread[-1][0].title or "Comparison"
    text = transcript.as_jsonl(thread) if format == "jsonl" else transcript.as_markdown(thread, title)
    kind = "application/jsonl" if format == "jsonl" else "text/markdown; charset=utf-8"
    name = f"comparison-{exchange_id.hex[:8]}.{format}"
    return Response(text, media_type=kind, headers={"content-disposition": f'attachment; filename="{name}"'})
