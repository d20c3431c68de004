"""Models of the Hugging Face hub by what a person types, with what decides whether one can be used here: size, license, terms, and how
it would come in. The hub's own address is asked (`HF_ENDPOINT`), and no other."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from app.errors import BadField, TooMany, Unavailable
from app.languages import gettext
from app.machines.hardware import Machine
from app.models import hub, hub_token
from app.shapes import FORMULAS

LIMIT = 20
MAX_QUERY = 200
SECONDS = 8.0
BYTES_PER_PARAMETER = 2.6
"""Memory of LoRA on a model in 16 bits: the weights, and a third of them for all else with short rows."""
_EXPANDED = ("safetensors", "downloads", "likes", "gated", "cardData", "config", "lastModified")


class HubModel(NamedTuple):
    """One model of the hub. `parameters` is None where it has no safetensors, which cannot be added."""

    repo: str
    parameters: int | None
    license: str | None
    downloads: int
    likes: int
    gated: bool
    architecture: str | None
    tier: str | None
    fits: bool | None
    updated: str | None


def search(query: str, machine: Machine, limit: int = LIMIT) -> list[HubModel]:
    """The models that the hub finds, most downloaded first. Raises BadField, and Unavailable where the hub is not to be asked or
    cannot be reached or does not accept the token, TooMany where it asks for patience."""
    import httpx

    if not query.strip() or len(query) > MAX_QUERY:
        raise BadField(
            gettext("Type 1 to %(most)s characters to search for.", most=MAX_QUERY),
            hint=gettext("Part of a name, such as smollm."),
            param="search",
        )
    hub.must_be_allowed()
    address = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    asked = {"search": query.strip(), "filter": "safetensors", "sort": "downloads", "direction": "-1", "limit": str(limit)}
    token = hub_token.read()
    try:
        answer = httpx.get(
            f"{address}/api/models",
            params=[*asked.items(), *(("expand[]", name) for name in _EXPANDED)],
            headers={"authorization": f"Bearer {token}"} if token else {},
            timeout=SECONDS,
        )
        if answer.status_code in (401, 403):
            raise Unavailable(
                gettext("The hub does not accept the token."),
                hint=gettext("Save a new one under Models, Hugging Face Hub."),
                code="hub_unauthorized",
            )
        if answer.status_code == 429:
            raise TooMany(gettext("The hub asks to wait."), hint=gettext("Try again in a minute; with a token more is allowed."))
        answer.raise_for_status()
        rows = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise Unavailable(
            gettext("The hub cannot be reached (%(error)s).", error=type(error).__name__),
            hint=gettext("Check the network, or add a starter model or a local folder; those need no hub."),
            code="hub_unreachable",
        ) from None
    return [_found(row, machine) for row in rows if isinstance(row, dict) and isinstance(row.get("id"), str)]


def _found(row: dict[str, Any], machine: Machine) -> HubModel:
    config, card = row.get("config") or {}, row.get("cardData") or {}
    total = (row.get("safetensors") or {}).get("total")
    parameters = total if isinstance(total, int) and total > 0 else None
    kind = config.get("model_type") if isinstance(config.get("model_type"), str) else None
    license_name = card.get("license")
    return HubModel(
        repo=row["id"][:200],
        parameters=parameters,
        license=str(license_name)[:40] if isinstance(license_name, str) else None,
        downloads=int(row.get("downloads") or 0),
        likes=int(row.get("likes") or 0),
        gated=bool(row.get("gated")),
        architecture=kind,
        tier="A" if kind in FORMULAS else None,
        fits=None if parameters is None else BYTES_PER_PARAMETER * parameters <= machine.training_memory_bytes,
        updated=str(row.get("lastModified") or "")[:10] or None,
    )


def to_json(found: HubModel) -> dict[str, Any]:
    return {"object": "hub_model", **found._asdict()}
