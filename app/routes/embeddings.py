"""`POST /v1/embeddings`, as OpenAI's clients call it."""

from __future__ import annotations

import base64
import secrets
import struct
import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from app import limits, schemas
from app.db import transaction
from app.errors import BadField, Unavailable
from app.inference import playground, reading
from app.inference.client import stream
from app.inference.protocol import MAX_TEXTS, Embedded, GenerateRequest, Sampling
from app.models import service as models
from app.schemas.openapi import answers
from app.tables import User
from app.web.auth import CurrentUser
from app.web.streaming import collect, left

api = APIRouter(prefix="/v1")
LONGEST = 200_000  # characters


class EmbeddingsBody(BaseModel):
    model_config = ConfigDict(extra="ignore")

    model: str = Field(min_length=1, max_length=512)
    input: str | list[str]
    encoding_format: Literal["float", "base64"] | None = "float"
    dimensions: int | None = Field(None, ge=1, description="Only the model's own size can be given.")
    user: str | None = Field(None, max_length=512, description="A name of the caller's own. Nothing of the call is kept, nor is this.")


@api.post("/embeddings", response_model=None, operation_id="create_embeddings", responses=answers(schemas.Embeddings, 404, 409))
async def embeddings(request: Request, body: EmbeddingsBody, user: CurrentUser) -> Response | dict[str, Any]:
    """Vectors of one or several texts, from an encoder."""
    texts = [body.input] if isinstance(body.input, str) else body.input
    if not 1 <= len(texts) <= MAX_TEXTS or not all(texts):
        raise BadField(f"input takes 1 to {MAX_TEXTS} texts, none of them empty.", param="input")
    if max(map(len, texts)) > LONGEST:
        raise BadField(f"A text has more than {LONGEST} characters.", hint="Cut it into parts.", param="input")
    heard = await collect(request, [stream(await run_in_threadpool(_request, user, body.model, texts))])
    if heard is None:
        return left()
    await run_in_threadpool(reading.count, user, heard, encoded=True)
    found = next((e for e in heard[0] if isinstance(e, Embedded)), None)
    if found is None:
        raise Unavailable("The encoder gave no answer.", hint="Ask again.")
    size = len(found.vectors[0])
    if body.dimensions not in (None, size):
        raise BadField(f"{body.model} gives vectors of {size} numbers.", hint="Leave dimensions out.", param="dimensions")
    data = [{"object": "embedding", "index": i, "embedding": _encoded(v, body.encoding_format)} for i, v in enumerate(found.vectors)]
    return {"object": "list", "data": data, "model": body.model, "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens}}


def _request(user: User, name: str, texts: list[str]) -> GenerateRequest:
    with transaction() as session:
        limits.check(session, user, "tokens_per_day")
        ref = models.resolve(session, user, name).ref
    if ref.kind != "encoder":
        raise BadField(f"{name} is no encoder, so it gives no embeddings.", hint="Add the starter all-minilm-l6-v2.", param="model")
    given = [playground.readable(text) for text in texts]
    return GenerateRequest(id=uuid.uuid4(), owner=user.id, model=ref, embed=given, sampling=Sampling(), seed=secrets.randbelow(2**31))


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    """A list of numbers, or little-endian float32 in base64, which OpenAI's clients request by default."""
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode() if form == "base64" else vector
