"""Models: `/v1/models` as OpenAI's client calls it, and the pages of models."""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Form, Query, Request
from fastapi.responses import HTMLResponse, RedirectResponse, Response, StreamingResponse
from pydantic import BaseModel, Field
from sqlalchemy import select
from sqlalchemy.orm import Session

from app import schemas
from app.db import Db
from app.errors import BadField, Conflict, Forbidden, StudioError, problem_json
from app.evaluation import service as evaluations
from app.evaluation import verdict
from app.export_formats import FORMATS
from app.inference import external_server, external_servers, residency, tryout
from app.kit import ids, zip_stream
from app.languages import gettext, mark
from app.models import aliases, export_facts, export_json, exports, import_folders, integrity, merging, model_card, starters
from app.models import imports as model_imports
from app.models import service as models
from app.models.dependants import dependants
from app.models.integrity import BadModel
from app.routes.accounts import safe_next
from app.schemas.openapi import answers
from app.settings import get_settings
from app.shapes import Shape
from app.strategies import STRATEGIES
from app.tables import Job, Model, User
from app.views import evaluation as evaluation_view
from app.views import lists, snippets
from app.web import auth, policy
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.templates import KINDS as KINDS_SHOWN
from app.web.templates import flash, public_address, render

api = APIRouter(prefix="/v1", tags=["models"])
pages = APIRouter()
MENU = (MenuPage(mark("Models"), "/models", "start", 30),)

CHILDREN = 50
"""Models made of one that its page lists; the others are on the list of models."""
KINDS = ("generic", "instruction", "dialogue", "encoder")
KIND_WORDS = {
    "generic": mark("predicts the next token"),
    "instruction": mark("follows one instruction"),
    "dialogue": mark("holds a conversation"),
    "classifier": mark("assigns a class"),
    "encoder": mark("turns a text into a vector"),
    "reward": mark("gives an answer a number"),
}


# JSON ---------------------------------------------------------------------------------------------------------------


class ModelOrder(BaseModel):
    """Exactly one of `starter`, `folder` and `hub` names the model's source."""

    starter: str | None = Field(None, description="Name of a starter model.")
    accept_terms: bool = Field(False, description="The starter's terms were read and accepted.")
    folder: str | None = Field(None, description="A transformers folder below an import folder of the studio.")
    hub: str | None = Field(None, description="Repository on the Hugging Face hub, owner/name.")
    revision: str | None = Field(None, description="Branch, tag or commit of the repository.")
    name: str | None = Field(None, description="What the model is called here.")
    kind: str | None = Field(None, description="generic, instruction, dialogue or encoder, where the guess is wrong.")


def to_json(session: Session, model: Model, name: str | None = None) -> dict[str, Any]:
    """OpenAI's model object with additional fields."""
    chain = models.lineage(session, model)
    return {
        "id": name or model.name,
        "object": "model",
        "created": int(model.created_at.timestamp()),
        "owned_by": "luthier" if model.project_id is None else "user",
        "key": ids.public(ids.MODEL, model.id),
        "title": model.title,
        "kind": model.kind,
        "tags": model.tags,
        "kept": model.kept,
        "status": model.status,
        "progress": model.progress,
        "error": problem_json(model.error),
        "base": chain[0].name if len(chain) > 1 else None,
        "lineage": [part.name for part in chain],
        "job": ids.public(ids.JOB, model.job_id) if model.job_id else None,
        "step": model.step,
        "strategy": model.strategy,
        "adapter": model.adapter,
        "shape": model.shape,
        "parameters": parameters(model),
        "certificate": model.certificate,
        "bytes": model.bytes,
        "license": model.license,
        "labels": model.labels,
        "engine": external_servers.to_json(model),
        "revision": model.revision,
        "adapter_sha256": model.adapter_sha256,
        "alias_of": None,
    }


def _alias_json(session: Session, name: str, model: Model) -> dict[str, Any]:
    return to_json(session, model, name) | {"alias_of": model.name}


def parameters(model: Model) -> int | None:
    """Parameters of the base model, without those of an adapter."""
    return Shape.model_validate(model.shape).parameters() if model.shape else None


@api.get("/models", operation_id="list_models", responses=answers(schemas.list_of(schemas.Model)))
def list_models(session: Db, user: CurrentUser) -> dict[str, Any]:
    """Every model that is ready or being fetched, then your aliases."""
    named, rows = aliases.of_models(session, user), []
    for model in models.list_(session, user):
        rows += [to_json(session, model), *(_alias_json(session, name, model) for name in named.get(model.id, ()))]
    return {"object": "list", "data": rows, "has_more": False}


@api.post("/models", operation_id="create_model", responses=answers(schemas.Model, 404, 409, 415))
def add_model(session: Db, user: CurrentUser, order: ModelOrder) -> dict[str, Any]:
    """Add a model. The response comes at once, with the status `fetching`."""
    return to_json(session, add(session, user, order))


@api.get("/models/{model:path}", operation_id="retrieve_model", responses=answers(schemas.Model))
def retrieve_model(session: Db, user: CurrentUser, model: str) -> dict[str, Any]:
    """A model by its name, alias or id, or a checkpoint as a model."""
    if ":ckpt-step-" in model or model.startswith("ftckpt_"):
        found = models.resolve(session, user, model)
        return to_json(session, found.model, name=found.ref.name)
    row = models.get(session, user, model)
    return _alias_json(session, model, row) if model not in (row.name, lists.public_id(row)) else to_json(session, row)


@api.delete("/models/{model:path}", operation_id="delete_model", responses=answers(schemas.Deleted, 409))
def delete_model(session: Db, user: CurrentUser, model: str) -> dict[str, Any]:
    """Delete a model. Refused while something depends on it."""
    row = models.get(session, user, model)
    may_change(user, row)
    models.delete(session, user, row)
    return {"id": row.name, "object": "model", "deleted": True}


def add(session: Session, user: User, order: ModelOrder) -> Model:
    """The row of a model that is being added. Raises BadField unless exactly one source is given."""
    named = [word for word in ("starter", "folder", "hub") if getattr(order, word)]
    if len(named) != 1:
        message = gettext("Say where the model comes from: one of starter, folder and hub.")
        raise BadField(message, hint=gettext("Give exactly one."), param="starter")
    if order.kind and order.kind not in KINDS:
        message = gettext("%(kind)s is no kind of model.", kind=repr(order.kind[:40]))
        raise BadField(message, hint=gettext("There are %(names)s.", names=", ".join(KINDS)), param="kind")
    if order.starter:
        return model_imports.add_starter(session, order.starter, accept_terms=order.accept_terms)
    if order.folder:
        return model_imports.add_folder(session, user, order.folder, order.name, kind=order.kind)
    return model_imports.add_hub(session, user, str(order.hub), order.name, order.revision)


def may_change(user: User, model: Model) -> None:
    """Only an admin may change or delete a shared model."""
    if model.project_id != user.project_id and user.role != "admin":
        raise Forbidden(gettext("%(model)s is shared by everyone here.", model=model.name), hint=gettext("Ask an admin."), param="model")


# The list -----------------------------------------------------------------------------------------------------------


def _groups(found: list[Model]) -> list[dict[str, Any]]:
    """Each base model with its fine-tuned descendants."""
    groups: dict[uuid.UUID, dict[str, Any]] = {}
    for model in found:
        base = models.root(model)
        group = groups.setdefault(base.id, {"base": base, "tuned": []})
        if model.id != base.id:
            group["tuned"].append(model)
    return sorted(groups.values(), key=lambda group: group["base"].created_at)


def _list_page(
    request: Request,
    session: Session,
    user: User,
    fault: StudioError | None = None,
    form: dict[str, str] | None = None,
    wish: lists.ListQuery | None = None,
) -> Response:
    bar = lists.models_bar(session, user, wish or lists.ListQuery(), {kind: gettext(word) for kind, word in KINDS_SHOWN.items()})
    found, bar.more = lists.models(session, user, bar)
    few_shot = {model.id for model in tryout.with_few_shot(session, found, limit=len(found))}
    own, known = select(Model.id).where(models.visible(user)), [starters.model_id(name) for name in starters.STARTERS]
    here = set(session.scalars(own.where(Model.id.in_(known))))
    return render(
        request,
        "models.html",
        status_code=fault.status if fault else 200,
        bar=bar,
        some=bool(found) or bar.narrowed,
        groups=_groups(found),
        busy=session.scalar(own.where(Model.status == "fetching").limit(1)) is not None,
        starters=[s for s in starters.STARTERS.values() if starters.model_id(s.name) not in here],
        folders=[path for path in import_folders.importable()],
        import_folder=import_folders.import_folders()[0],
        offline=get_settings().offline,
        kinds=KINDS,
        kind_words=KIND_WORDS,
        strategies=STRATEGIES,
        parameters=parameters,
        public_id=lists.public_id,
        try_url=lambda base, model: tryout.address(base.name, model.name, model.kind, model.id in few_shot),
        fault=fault,
        **residency.part(session, user),
        form={"folder": "", "hub": "", "revision": "", "name": "", "kind": ""} | (form or {}),
    )


@pages.get("/models", response_class=HTMLResponse)
def list_page(request: Request, session: Db, user: CurrentUser, wish: Annotated[lists.ListQuery, Query()]) -> Response:
    return _list_page(request, session, user, wish=wish)


@pages.post("/models")
def add_from_form(
    request: Request,
    session: Db,
    user: CurrentUser,
    starter: Annotated[str, Form()] = "",
    accept_terms: Annotated[bool, Form()] = False,
    folder: Annotated[str, Form()] = "",
    hub: Annotated[str, Form()] = "",
    revision: Annotated[str, Form()] = "",
    name: Annotated[str, Form()] = "",
    kind: Annotated[str, Form()] = "",
    then: Annotated[str, Form(alias="next")] = "/models",
) -> Response:
    """The forms of the Models page, and of pages that offer one of its models. On an error the page shows it and keeps the input."""
    texts = {"folder": folder, "hub": hub, "revision": revision, "name": name, "kind": kind}
    order = ModelOrder(starter=starter or None, accept_terms=accept_terms, **{k: v.strip() or None for k, v in texts.items()})
    try:
        with session.begin_nested():
            model = add(session, user, order)
    except Conflict as fault:
        if fault.code == "terms_not_accepted":
            return RedirectResponse(f"/models/terms/{starter}", status_code=303)
        return _list_page(request, session, user, fault, texts)
    except StudioError as fault:
        return _list_page(request, session, user, fault, texts)
    flash(request, gettext("%(model)s is being downloaded. It can be used as soon as it is ready.", model=model.title))
    return RedirectResponse(safe_next(then), status_code=303)


@pages.get("/models/terms/{name}", response_class=HTMLResponse)
def terms_page(request: Request, user: CurrentUser, name: str, then: Annotated[str, Query(alias="next")] = "/models") -> Response:
    """The license terms of a starter model, to be accepted before it is fetched."""
    starter = starters.find(name)
    return render(request, "model_terms.html", starter=starter, text=starters.terms(name), next=safe_next(then))


# One model ----------------------------------------------------------------------------------------------------------


Tab = Literal["use", "export", "evaluations", "lineage", "files", "settings"]
TABS: dict[Tab, str] = {
    "use": mark("Use"), "export": mark("Export"), "evaluations": mark("Evaluations"), "lineage": mark("Lineage"),
    "files": mark("Files & hashes"), "settings": mark("Settings"),
}  # fmt: skip


@pages.get("/models/{key}", response_class=HTMLResponse)
def model_page(request: Request, session: Db, user: CurrentUser, key: str, tab: Tab = "use") -> Response:
    return show_model(request, session, user, models.get(session, user, key), tab)


@pages.post("/models/{key}/api-key", response_class=HTMLResponse)
def create_api_key(request: Request, session: Db, user: CurrentUser, key: str) -> Response:
    """Create an API key, shown once, inside the code that uses it. It reads, and where the role allows it runs models."""
    model = models.get(session, user, key)
    scopes = [scope for scope in ("read", "generate") if scope in policy.ALLOWED[user.role]]
    _, text = auth.create_key(session, user, model.title, scopes)
    return show_model(request, session, user, model, "use", new_key=text)


def show_model(
    request: Request,
    session: Session,
    user: User,
    model: Model,
    tab: Tab,
    fault: StudioError | None = None,
    new_key: str = "",
    alias: str = "",
) -> Response:
    """The page of a model. `alias` is the input of its alias form."""
    chain, page = models.lineage(session, model), f"/models/{lists.public_id(model)}"
    job = session.get(Job, model.job_id) if model.job_id else None
    own_to_change = model.project_id == user.project_id or user.role == "admin"
    below = models.children(session, user, model, CHILDREN + 1) if tab == "lineage" else []
    merged = (
        session.scalar(select(Model).where(Model.id == merging.merged_id(model), Model.deleted_at.is_(None))) if model.adapter else None
    )
    named = aliases.list_(session, user)
    own = [one.alias.name for one in named if one.model.id == model.id]
    facts = export_facts.facts(session, model) if tab == "export" else None
    exported = exports.of_model(session, user, model) if tab == "export" else []
    address = f"{public_address(request)}/v1"
    return render(
        request,
        "model.html",
        status_code=fault.status if fault else 200,
        model=model,
        page=page,
        tab=tab,
        tab_items=[(name, gettext(title)) for name, title in TABS.items()],
        key=lists.public_id(model),
        chain=chain,
        below=below[:CHILDREN],
        more_below=len(below) > CHILDREN,
        job=job,
        job_key=ids.public(ids.JOB, job.id) if job else None,
        verdict=verdict.of_job(job) if job else None,
        try_url=tryout.address(chain[-2].name if job else "", model.name, model.kind, tryout.has_examples(job)),
        shape=Shape.model_validate(model.shape) if model.shape else None,
        parameters=parameters(model),
        strategy=STRATEGIES.get(model.strategy or ""),
        files=models.hashes(model),
        needed=dependants(session, model) if own_to_change and tab == "settings" else None,
        rows=evaluation_view.rows(session, evaluations.list_(session, user, model_id=model.id)),
        blends=evaluation_view.blend_panel(session, user, model, f"{page}?tab=evaluations"),
        kind_words=KIND_WORDS,
        load_code=model_card.load_code(model.kind, models.made_of(session, model)),
        snippets=snippets.snippets(model.kind, own[0] if own else model.name, address, new_key or snippets.NO_KEY),
        new_key=new_key,
        alias=alias,
        aliases=own,
        aliases_elsewhere=[one for one in named if one.model.id != model.id],
        merged=merged,
        export_formats=export_facts.choices(facts) if facts else [],
        export_bytes=lambda kind, name: kind.bytes_of(facts, [name]),
        export_title=lambda name: FORMATS[name].title if name in FORMATS else name,
        exports=[export_json.to_json(one) for one in exported],
        exporting=any(one.status in exports.OPEN for one in exported),
        merges=merging.can_merge(session, model),
        public_id=lists.public_id,
        may_change=own_to_change,
        engines=list(external_server.allowed()) if user.role == "admin" else [],
        llama_types=external_servers.llama_types(model) if own_to_change else (),
        fault=fault,
    )


@pages.post("/models/{key}/delete")
def delete_from_page(request: Request, session: Db, user: CurrentUser, key: str) -> Response:
    model = models.get(session, user, key)
    may_change(user, model)
    try:
        models.delete(session, user, model)
    except Conflict as fault:
        return show_model(request, session, user, model, "settings", fault)
    flash(request, gettext("%(name)s was deleted.", name=model.title))
    return RedirectResponse("/models", status_code=303)


@pages.post("/models/{key}/keep")
def keep(request: Request, session: Db, user: CurrentUser, key: str, then: Annotated[str, Form(alias="next")] = "") -> Response:
    """Keep the result of a comparison, so that it is offered wherever a model is chosen."""
    model = models.get(session, user, key)
    may_change(user, model)
    models.keep(model)
    flash(request, gettext("%(model)s is kept: it is listed with the other models and can be chosen everywhere.", model=model.title))
    return RedirectResponse(safe_next(then or f"/models/{lists.public_id(model)}"), status_code=303)


@pages.post("/models/{key}/retry")
def retry(session: Db, user: CurrentUser, key: str, then: Annotated[str, Form(alias="next")] = "/models") -> Response:
    model = models.get(session, user, key)
    may_change(user, model)
    model_imports.try_again(session, model)
    return RedirectResponse(safe_next(then), status_code=303)


@pages.post("/models/{key}/merge")
def merge(request: Request, session: Db, user: CurrentUser, key: str) -> Response:
    merged = merging.merge(session, user, models.get(session, user, key))
    flash(request, gettext("The adapter is being merged. The merged model is listed below the fine-tuned one."))
    return RedirectResponse(f"/models/{lists.public_id(merged)}", status_code=303)


@pages.get("/models/{key}/download")
def download(session: Db, user: CurrentUser, key: str) -> StreamingResponse:
    """The model's folder as a zip: an adapter in the layout of `PeftModel.from_pretrained`, or full weights. Raises BadModel when
    a file does not match the manifest."""
    model = models.get(session, user, key)
    models.reference(session, model)  # raises where the model is not ready
    folder = models.own_folder(model)
    if folder is None:
        raise Conflict(gettext("The files of %(model)s are not there.", model=model.name), hint=gettext("Add the model again."))
    try:
        integrity.check(str(model.path), model.name, model.revision)
    except BadModel as damaged:
        integrity.tell(damaged)
        raise
    chain = models.lineage(session, model)
    job = session.get(Job, model.job_id) if model.job_id else None
    made_of = models.made_of(session, model)
    stream = zip_stream.zip_of(folder, model_card.card(model, chain, job, made_of), made_of.base)
    safe = "".join(c if c.isalnum() or c in "._-" else "-" for c in model.name)
    headers = {"content-disposition": f'attachment; filename="{safe}.zip"', "x-content-type-options": "nosniff"}
    return StreamingResponse(stream, media_type="application/zip", headers=headers)
