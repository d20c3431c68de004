"""Who may call what: one table of every operation, and the one check at the edge.

The table gives each operation its scope. A role allows some scopes, an API key all of them or fewer; the request needs one that both
allow. An operation that is not in the table is for admins alone, and `tests/security/test_sweep.py` fails until it is in.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Literal, get_args

from fastapi import Request

from app.errors import BadField, Forbidden
from app.languages import gettext, mark
from app.ownership import may_change
from app.tables import User

Scope = Literal["read", "generate", "write", "session", "account", "admin"]
Role = Literal["admin", "member", "viewer"]
ROLES: tuple[Role, ...] = get_args(Role)
ROLE_WORDS = (mark("admin"), mark("member"), mark("viewer"), mark("guest"), mark("Admin"), mark("Member"), mark("Viewer"), mark("Guest"))
"""The roles as pages write them, in sentences and as labels: `gettext` of a role translates it."""

ALLOWED: dict[str, frozenset[Scope]] = {
    "guest": frozenset({"read", "session"}),
    "viewer": frozenset({"read", "session", "account"}),
    "member": frozenset({"read", "generate", "write", "session", "account"}),
    "admin": frozenset({"read", "generate", "write", "session", "account", "admin"}),
}
"""Scopes of each role. `session` is of a browser alone (colors, signing out), and `account` what a person does with the account itself:
password, sessions, keys, projects. No key has these, so that a lost key makes no further ones. A guest came by the link of a project."""

KEY_SCOPES: dict[str, frozenset[Scope]] = {
    "read": frozenset({"read"}),
    "generate": frozenset({"generate"}),
    "write": frozenset({"read", "generate", "write"}),
    "admin": frozenset({"read", "generate", "write", "admin"}),
}
"""What each scope of an API key allows, as far as the role of its person does."""

TABLE: dict[Scope, str] = {
    "read": """
GET / /compare /compare/curves /compare/new /compare/{comparison_id} /datasets /datasets/combine /datasets/join /datasets/new
GET /datasets/{key} /datasets/{key}/conflicts /datasets/{key}/findings.{kind} /datasets/{key}/rows /datasets/{key}/rows/{line}
GET /datasets/{key}/split /datasets/{key}/state /evaluations /evaluations/{evaluation_id} /first-model /guide /guide/{strategy} /jobs
GET /learn /learn/{stop}
GET /searches /searches/new /searches/{search_id} /v1/searches /v1/searches/{search_id}
GET /jobs/advice /jobs/compare /jobs/new /jobs/new/file /jobs/{job_id} /jobs/{job_id}/checkpoints/{step}/download /jobs/{job_id}/job.yaml
GET /jobs/{job_id}/log.txt /jobs/{job_id}/results.csv /jobs/{job_id}/stream /models /models/loaded /models/terms/{name} /models/{key}
GET /models/hub /v1/hub/models /models/{key}/download /playground /playground/ab /playground/ab/{vote_id} /playground/arena /playground/arena/{vote_id}
GET /v1/chat/completions /v1/chat/completions/{completion_id} /v1/chat/completions/{completion_id}/messages
GET /v1/responses/{response_id} /v1/responses/{response_id}/input_items
GET /evals /evals/{eval_id} /v1/evals /v1/evals/{eval_id} /v1/evals/{eval_id}/runs /v1/evals/{eval_id}/runs/{run_id}
GET /v1/evals/{eval_id}/runs/{run_id}/output_items /v1/evals/{eval_id}/runs/{run_id}/output_items/{output_item_id}
GET /settings/webhooks /v1/webhook_endpoints /v1/webhook_endpoints/{webhook_endpoint_id} /v1/webhook_event_types
GET /playground/batches /playground/batches/{batch_id}/{which} /v1/batches /v1/batches/{batch_id}
GET /playground/batch /playground/batch/{prediction_id}/download /playground/classify /playground/kinds /playground/lab
GET /playground/lab/prompts/{rest:path} /playground/lab/{rest:path} /playground/next-tokens /playground/prompts /playground/prompts/new
GET /playground/prompts/runs/{run_id} /playground/prompts/{prompt_id} /playground/tokens /playground/tutorial /playground/vectors
GET /playground/vectors/{key} /playground/{exchange_id:uuid} /playground/{exchange_id:uuid}/export /shell /standby /v1/comparisons
GET /v1/comparisons/{comparison_id} /v1/datasets /v1/datasets/{key} /v1/datasets/{key}/changes /v1/datasets/{key}/lines/{line}
GET /v1/datasets/{key}/report /v1/datasets/{key}/rows /v1/datasets/{key}/split /v1/evaluations /v1/evaluations/{evaluation_id}
GET /distillations /distillations/{distillation_id} /v1/distillations /v1/distillations/{distillation_id} /v1/distillations/{distillation_id}/rows
GET /graders /graders/new /graders/{grader_id} /v1/graders /v1/graders/{grader_id} /v1/exports /v1/exports/{export_id} /v1/exports/{export_id}/files/{name:path} /v1/files /v1/files/{file_id}
GET /v1/files/{file_id}/content /v1/files/{file_id}/report /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions /v1/fine_tuning/jobs
GET /v1/fine_tuning/jobs/{job_id} /v1/fine_tuning/jobs/{job_id}/checkpoints /v1/fine_tuning/jobs/{job_id}/events
GET /v1/fine_tuning/jobs/{job_id}/trackers /v1/fine_tuning/jobs/{job_id}/stream /v1/model_aliases /v1/model_aliases/{alias:path}/moves /aliases/{alias:path} /v1/models /v1/models/loaded /v1/models/{model:path} /v1/openapi.json
GET /v1/predictions /v1/predictions/{prediction_id} /v1/predictions/{prediction_id}/content /v1/prompts /v1/prompts/runs/{run_id}
GET /v1/prompts/runs/{run_id}/results /v1/prompts/{prompt_id} /v1/prompts/{prompt_id}/runs /v1/standby /v1/strategies /v1/studio /v1/votes
GET /v1/votes/scores
OPTIONS /v1/tus
HEAD /v1/tus/{key}
""",
    "generate": """
POST /v1/chat/completions /v1/classify /v1/completions /v1/embeddings /v1/next_tokens /v1/responses
POST /v1/fine_tuning/alpha/graders/run /v1/fine_tuning/alpha/graders/validate /v1/graders/compare
""",
    "write": """
POST /compare /compare/{comparison_id}/cancel /compare/{comparison_id}/delete /compare/{comparison_id}/keep /datasets /datasets/combine
POST /datasets/hub /datasets/paste /datasets/samples/{name} /datasets/{key}/conflicts /datasets/{key}/delete /datasets/{key}/drop
POST /datasets/{key}/fix /datasets/{key}/read /datasets/{key}/repair /datasets/{key}/retry /datasets/{key}/roles
POST /datasets/{key}/rows/{line} /datasets/{key}/split/drop /evaluations /evaluations/{evaluation_id}/cancel
POST /evaluations/{evaluation_id}/delete /exports/{export_id}/cancel /exports/{export_id}/delete /exports/{export_id}/push /jobs
POST /learn/{stop}
POST /searches /searches/{search_id}/cancel /searches/{search_id}/delete /v1/searches /v1/searches/plan /v1/searches/{search_id}/cancel
DELETE /v1/searches/{search_id}
PATCH /v1/searches/{search_id}
POST /jobs/advice /jobs/new/file /jobs/{job_id}/checkpoints/{step}/keep /jobs/{job_id}/delete /jobs/{job_id}/pause /jobs/{job_id}/resume
POST /jobs/{job_id}/retry /jobs/{job_id}/save /jobs/{job_id}/stop /models /models/{key}/aliases /models/{key}/aliases/remove
POST /models/{key}/delete /models/{key}/engine /models/{key}/engine/check /models/{key}/exports /models/{key}/keep /models/{key}/merge
POST /models/{key}/retry /playground /playground/arena /playground/arena-dataset /playground/arena/{vote_id} /playground/batch
POST /playground/batch/{prediction_id}/cancel /playground/batch/{prediction_id}/delete /playground/prefer /playground/prompts
POST /playground/prompts/preview /playground/prompts/runs /playground/prompts/runs/{run_id}/{action} /playground/prompts/try
POST /playground/prompts/{prompt_id}/delete /playground/stream /playground/tutorial/dialogue /playground/tutorial/instruction
POST /playground/vectors /playground/vectors/{key}/cancel /playground/{exchange_id:uuid}/save /v1/advice /v1/comparisons
POST /v1/comparisons/plan /v1/comparisons/{comparison_id}/cancel /v1/datasets /v1/datasets/hub /v1/datasets/{key}/again
POST /v1/datasets/{key}/edits /v1/datasets/{key}/fixes /v1/datasets/{key}/readings /v1/datasets/{key}/reparse /v1/datasets/{key}/retry
POST /v1/engines /v1/engines/{model:path}/check /v1/estimates /v1/evaluations /v1/evaluations/{evaluation_id}/cancel
POST /v1/exports/{export_id}/cancel /v1/exports/{export_id}/push /v1/files /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions
POST /v1/fine_tuning/jobs /v1/fine_tuning/jobs/{job_id}/cancel /v1/fine_tuning/jobs/{job_id}/checkpoints/{step}/keep
POST /v1/fine_tuning/jobs/{job_id}/pause /v1/fine_tuning/jobs/{job_id}/resume /v1/models /v1/models/{model:path}/exports /v1/predictions
POST /v1/predictions/{prediction_id}/cancel /v1/prompts /v1/prompts/runs/{run_id}/cancel /v1/prompts/{prompt_id}
POST /v1/prompts/{prompt_id}/runs /v1/tus /v1/uploads /v1/uploads/{upload_id}/parts
POST /v1/uploads/{upload_id}/complete /v1/uploads/{upload_id}/cancel /v1/votes /v1/votes/dataset /{place}/bulk /{place}/{key}/name
POST /v1/chat/completions/{completion_id} /v1/datasets/stored_completions
DELETE /v1/chat/completions/{completion_id} /v1/responses/{response_id}
POST /v1/evals /v1/evals/{eval_id} /v1/evals/{eval_id}/runs /v1/evals/{eval_id}/runs/{run_id} /v1/evals/{eval_id}/runs/{run_id}/cancel
POST /evals/{eval_id}/delete /evals/{eval_id}/runs/{run_id}/{action}
DELETE /v1/evals/{eval_id} /v1/evals/{eval_id}/runs/{run_id}
POST /v1/webhook_endpoints /v1/webhook_endpoints/{webhook_endpoint_id} /v1/webhook_endpoints/{webhook_endpoint_id}/rotate_secret
POST /v1/webhook_endpoints/{webhook_endpoint_id}/test /settings/webhooks /settings/webhooks/{webhook_endpoint_id}/{action}
DELETE /v1/webhook_endpoints/{webhook_endpoint_id}
POST /playground/batches /playground/batches/{batch_id}/cancel /v1/batches /v1/batches/{batch_id}/cancel
POST /v1/fine_tuning/jobs/{job_id}/trackers /jobs/{job_id}/trackers
POST /distillations /distillations/{distillation_id}/{action} /v1/distillations /v1/distillations/{distillation_id}/cancel
POST /v1/distillations/{distillation_id}/resume
DELETE /v1/distillations/{distillation_id}
POST /v1/graders /graders /graders/try /graders/{grader_id}/delete
PATCH /v1/graders/{grader_id}
DELETE /v1/graders/{grader_id} /v1/comparisons/{comparison_id} /v1/datasets/{key} /v1/engines/{model:path} /v1/evaluations/{evaluation_id} /v1/exports/{export_id}
DELETE /v1/files/{file_id} /v1/fine_tuning/checkpoints/{checkpoint:path}/permissions/{permission_id} /v1/model_aliases/{alias:path}
DELETE /v1/models/{model:path} /v1/predictions/{prediction_id} /v1/prompts/{prompt_id} /v1/tus/{key}
PATCH /v1/comparisons/{comparison_id} /v1/datasets/{key} /v1/fine_tuning/jobs/{job_id} /v1/models/{model:path} /v1/tus/{key}
PUT /v1/model_aliases/{alias:path}
POST /v1/model_aliases/{alias:path}/back /v1/model_aliases/{alias:path}/evaluations
POST /aliases/{alias:path}/model /aliases/{alias:path}/gate /aliases/{alias:path}/evaluations /aliases/{alias:path}/back
""",
    "session": """
POST /sign-out /theme /language
""",
    "account": """
POST /settings/account/identities /settings/account/identities/{identity_id}/remove
POST /models/{key}/api-key /settings/account/password /settings/account/sessions/{session_id}/end /settings/account/sign-out-everywhere
POST /settings/account/two-step /settings/account/two-step/confirm /settings/account/two-step/off /settings/keys
POST /settings/keys/{key}/revoke
GET /settings /settings/account /settings/projects /settings/projects/{project_id}
POST /project /settings/projects /settings/projects/{project_id}/name /settings/projects/{project_id}/members
POST /settings/projects/{project_id}/members/{user_id}/remove /settings/projects/{project_id}/links
POST /settings/projects/{project_id}/links/{link_id}/revoke /settings/projects/{project_id}/delete
""",
    "admin": """
POST /models/hub/token
GET /admin/limits
POST /admin/limits/people/{user_id} /admin/limits/projects/{project_id}
GET /admin /admin/audit /admin/audit/export /v1/organization/audit_logs
GET /settings/people /v1/engines /v1/organization/invites /v1/organization/invites/{invite_id} /v1/organization/users /v1/organization/users/{user_id}
POST /settings/people/invitations /settings/people/invitations/{invitation_id}/revoke /settings/people/{user_id}/disable
POST /settings/people/{user_id}/enable /settings/people/{user_id}/role /v1/organization/invites /v1/organization/users/{user_id}
DELETE /v1/organization/invites/{invite_id} /v1/organization/projects/{project_id}/users/{user_id}
POST /settings/people/{user_id}/hand-over
GET /v1/organization/projects /v1/organization/projects/{project_id} /v1/organization/projects/{project_id}/users
GET /v1/organization/projects/{project_id}/users/{user_id} /v1/organization/projects/{project_id}/contents
DELETE /v1/organization/projects/{project_id}
POST /v1/organization/projects /v1/organization/projects/{project_id} /v1/organization/projects/{project_id}/users
POST /v1/organization/projects/{project_id}/users/{user_id}
""",
}
"""Scope → lines of a method and its paths, as the routes declare them. `generate` runs models and changes nothing but the history."""


@cache
def scopes() -> dict[tuple[str, str], Scope]:
    """(method, path of the route) → scope."""
    found: dict[tuple[str, str], Scope] = {}
    for scope, lines in TABLE.items():
        for method, *paths in (line.split() for line in lines.strip().splitlines()):
            for path in paths:
                assert (method, path) not in found, f"{method} {path} has two scopes"
                found[method, path] = scope
    return found


def scope_of(method: str, path: str) -> Scope:
    known = scopes()
    if method == "HEAD" and (method, path) not in known:
        method = "GET"
    return known.get((method, path), "admin")


def check(request: Request, user: User, project_role: str, key_scopes: Sequence[str] | None) -> None:
    """Raises Forbidden where this person's role or this key does not allow the request. `key_scopes` is None for a browser."""
    needed = scope_of(request.method, request.scope["route"].path)
    if needed in ("write", "generate") and user.role in ("member", "admin") and not may_change(project_role):
        raise Forbidden(
            gettext("You may look at everything in this project and change nothing: your role in it is viewer."),
            hint=gettext("Ask one of its admins, or choose another project."),
            code="insufficient_permissions",
        )
    if needed not in ALLOWED[user.role]:
        raise Forbidden(_reason(user.role, needed), hint=gettext(_HINTS[user.role]), code="insufficient_permissions")
    if key_scopes is None:
        return
    if needed in ("account", "session"):
        raise Forbidden(
            "No API key may do this: it belongs to the account itself.", hint="Sign in with a browser.", code="insufficient_permissions"
        )
    if needed not in granted(key_scopes):
        raise Forbidden(
            f"This API key may not do this: its scopes are {', '.join(key_scopes)}, and {needed} is needed.",
            hint="Create a key with that scope under Settings.",
            code="insufficient_permissions",
        )


def changes(request: Request, user: User) -> bool:
    """Whether this person may change anything in the project that the request works in."""
    return "write" in ALLOWED[user.role] and may_change(request.state.project_role)


def granted(key_scopes: Iterable[str]) -> frozenset[Scope]:
    """What the scopes of a key allow together."""
    return frozenset().union(*(KEY_SCOPES[scope] for scope in key_scopes))


def clean_scopes(user: User, wanted: Iterable[str]) -> list[str]:
    """Scopes for a new key of this person, without those that another one holds already. None wanted: all that the role allows.

    Raises BadField, and Forbidden for one that the role does not allow.
    """
    asked = set(wanted)
    if unknown := asked - set(KEY_SCOPES):
        message = gettext("%(scope)s is no scope.", scope=repr(min(unknown)[:40]))
        raise BadField(message, hint=gettext("Scopes are %(scopes)s.", scopes=", ".join(KEY_SCOPES)), param="scopes")
    allowed = [scope for scope, grants in KEY_SCOPES.items() if grants <= ALLOWED[user.role]]
    if beyond := asked - set(allowed):
        raise Forbidden(
            gettext("Your role is %(role)s: no key of yours has the scope %(scope)s.", role=gettext(user.role), scope=min(beyond)),
            hint=gettext("Take another scope."),
            code="insufficient_permissions",
        )
    chosen = asked or {allowed[-1]}
    return [one for one in KEY_SCOPES if one in chosen and not any(KEY_SCOPES[one] < KEY_SCOPES[other] for other in chosen)]


_HINTS = {
    "guest": mark("Ask for an invitation."),
    "viewer": mark("Ask an admin of the studio to make you a member."),
    "member": mark("Ask an admin of the studio."),
    "admin": "",
}


def check_role(role: str) -> None:
    if role not in ROLES:
        message = gettext("%(role)s is no role.", role=repr(role[:40]))
        raise BadField(message, hint=gettext("It is one of %(roles)s.", roles=", ".join(ROLES)), param="role")


def _reason(role: str, needed: Scope) -> str:
    if role == "guest" and needed not in ("write", "generate"):
        return gettext("This is for people with an account; your role is guest.")
    if needed == "admin":
        return gettext("Only admins may do this; your role is %(role)s.", role=gettext(role))
    return gettext("You may look at everything here and change nothing: your role is %(role)s.", role=gettext(role))
