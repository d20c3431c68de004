"""Liveness, readiness and metrics, for supervisors, load balancers and Prometheus."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from app import schemas
from app.errors import NotSignedIn
from app.kit.addresses import is_loopback
from app.schemas.openapi import answers, document
from app.views import measurements, overview
from app.web import auth
from app.web import metrics as web_metrics
from app.web.auth import CurrentUser

pages = APIRouter()
api = APIRouter(prefix="/v1")


@pages.get("/healthz")
async def healthz() -> dict[str, str]:
    """Liveness: the process responds. Nothing else is checked, because a database that is down is no reason to restart the web
    process. It runs without a worker thread, since all of them may be blocked by an unresponsive database."""
    return {"status": "ok"}


@pages.get("/readyz")
async def readyz() -> JSONResponse:
    """Readiness: 503 while the database, its schema or the broker is unavailable, or does not respond within
    `overview.CHECK_SECONDS`."""
    found, workers = await overview.checks_in_time()
    ready = all(check.good for check in found)
    body = {
        "status": "ready" if ready else "waiting",
        "checks": {check.name: check.model_dump(exclude={"name"}, exclude_defaults=True) for check in found},
        "workers": [
            {"queue": w.queue, "up_seconds": round(w.up_seconds, 1), "silent_seconds": round(w.silent_seconds, 1)} for w in workers
        ],
    }
    return JSONResponse(body, 200 if ready else 503, headers={} if ready else {"retry-after": "1"})


@pages.get("/metrics")
def metrics(request: Request) -> Response:
    """Metrics in Prometheus' text format, for requests from this machine and for signed-in users."""
    if not _local(request) and auth.identify(request) is None:
        raise NotSignedIn("The metrics are for this machine and for the signed-in.", hint="Send an API key.")
    return Response(web_metrics.text(measurements.families()), media_type="text/plain; version=0.0.4")


def _local(request: Request) -> bool:
    """Whether the request comes from this machine, and not through a proxy on it."""
    if request.client is None or any(name in request.headers for name in ("x-forwarded-for", "x-real-ip", "forwarded", "via")):
        return False
    return is_loopback(request.client.host)


@api.get("/studio", operation_id="retrieve_studio", responses=answers(schemas.Studio))
def state(user: CurrentUser) -> dict[str, Any]:
    """The health of every component, as the Overview and the Settings show it."""
    return {
        "object": "studio",
        "checks": [check.model_dump() for check in overview.checks()],
        "workers": [duty.model_dump() for duty in overview.duties()],
        "versions": dict(overview.versions()),
    }


@api.get("/openapi.json", operation_id="retrieve_openapi", responses=answers(schemas.OpenAPIDocument))
def openapi(request: Request, user: CurrentUser) -> dict[str, Any]:
    """The OpenAPI document of everything under /v1."""
    return document(request.app)
