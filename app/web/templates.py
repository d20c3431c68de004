"""Renders pages: the templates, their globals and filters, and flash messages."""

from __future__ import annotations

import hashlib
import json
import re
from contextvars import ContextVar
from functools import cache
from typing import Any, Literal

from fastapi import Request
from fastapi.responses import HTMLResponse
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from jinja2.ext import Extension
from jinja2.utils import htmlsafe_json_dumps
from markupsafe import Markup, escape

from app import languages, objectives
from app.kit.humanize import ago, clock, human_bytes, human_count, human_number, human_percent, human_seconds
from app.kit.states import state_word
from app.languages import gettext, mark
from app.settings import RESOURCES, get_settings

STATIC = RESOURCES / "static"
current: ContextVar[Request] = ContextVar("request")
"""The request being answered. `app.web.middleware` sets it, so that macros need no context passed down."""


def render(request: Request, name: str, /, status_code: int = 200, **context: Any) -> HTMLResponse:
    """A page from `templates/`. In addition to `context` it gets the user, the counts of the menu and flash messages."""
    from app.web import navigation  # it imports the services, which must not be needed to show an error page

    user = getattr(request.state, "user", None)
    values = {"request": request, "user": user, "theme": theme(request), "messages": take_messages(request)}
    if user is not None and not name.startswith("parts/"):
        values |= navigation.menu(request, user)
    html = environment().get_template(name).render(values | context)
    return HTMLResponse(html, status_code=status_code, headers={"cache-control": "no-store"})


def public_address(request: Request) -> str:
    """The studio's address as people type it, without a slash at its end."""
    return (get_settings().public_url or str(request.base_url)).rstrip("/")


@cache
def environment() -> Environment:
    env = Environment(
        loader=FileSystemLoader(RESOURCES / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Nonces, "jinja2.ext.i18n"],
    )
    env.policies["ext.i18n.trimmed"] = True
    from app import metrics
    from app.datasets import issue_names
    from app.models import service as models  # the first page needs them; the import of the web process does not

    env.filters |= {
        "bytes": human_bytes, "seconds": human_seconds, "ago": ago, "number": human_number, "count": human_count, "percent": human_percent, "markdown": markdown,
        "time": clock, "state": state_word, "kind": kind_word, "ticks": ticks, "as_json": as_json, "issue": issue_names.title,
    }  # fmt: skip
    env.filters |= {
        "model_option": models.option_text,
        "ability": metrics.ability,
        "figure": metrics.figure,
        "ability_word": lambda said: gettext(metrics.ABILITY[said]) if said in metrics.ABILITY else said or "",
    }
    env.globals |= {
        "metric_table": metrics.METRICS,
        "objective": objectives.get,
        "static": static, "integrity": integrity, "csrf_field": csrf_field, "csrf_query": csrf_query, "csrf_token": _token,
        "_": languages.gettext, "gettext": languages.gettext, "ngettext": languages.ngettext, "language": languages.current.get,
        "languages": languages.LANGUAGES, "script_words": _script_words,
        "nonce": _nonce, "user": None, "theme": "", "messages": [], "nav": [], "foot": [], "projects": (),
    }  # fmt: skip
    return env


class Nonces(Extension):
    """Adds the page's nonce to every element of a template that has an htmx attribute.

    The htmx CSP extension ignores elements without it, so markup injected through data can never send requests. Only the source
    of our templates is processed, before any data is filled in.
    """

    def preprocess(self, source: str, name: str | None, filename: str | None = None) -> str:
        return re.sub(r"(<[a-zA-Z][^<]*?\s)(hx-[a-z]+[:=])", r'\1hx-nonce="{{ nonce() }}" \2', source)


# Forms and static files -----------------------------------------------------------------------------------------------


def _token() -> str:
    from app.web.csrf import csrf_token

    return csrf_token(current.get())


def csrf_field() -> Markup:
    """The hidden field every form with `method="post"` needs."""
    return Markup('<input type="hidden" name="csrf_token" value="{}">').format(_token())


def csrf_query() -> str:
    """The same for a multipart form whose route reads the body as a stream: put it behind the `?` of the action."""
    return f"csrf_token={_token()}"


def _script_words() -> Markup:
    """The scripts' own texts in the page's language: an element that `static/js/words.js` reads; nothing for English."""
    words = languages.words(languages.current.get())
    return Markup('<script type="application/json" id="words">{}</script>').format(_json_data(words)) if words else Markup("")


def _json_data(value: Any) -> Markup:
    return htmlsafe_json_dumps(value, ensure_ascii=False)


def _nonce() -> str:
    return str(current.get().state.nonce)


@cache
def static_version() -> str:
    """One hash over all static files. It is a part of their path, so that modules which import each other stay consistent."""
    digest = hashlib.sha256()
    for path in sorted(p for p in STATIC.rglob("*") if p.is_file()):
        digest.update(path.relative_to(STATIC).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def static(path: str) -> str:
    """The URL of a file of `static/`, which browsers may cache forever: it changes whenever a file does."""
    return f"/static/{static_version()}/{path}"


@cache
def vendored() -> dict[str, str]:
    """File under `static/vendor/` → its `sha384-…`, from the lock."""
    return {item["file"]: item["integrity"] for item in json.loads((STATIC / "vendor" / "lock.json").read_text())}


def integrity(file: str) -> str:
    return vendored()[file]


# Messages and theme ---------------------------------------------------------------------------------------------------


def messages_cookie() -> str:
    """The cookie that holds messages until the next page of this studio."""
    from app.web.auth import studio_mark

    return f"luthier_messages_{studio_mark()}"


def flash(request: Request, text: str, kind: Literal["good", "warn", "bad"] = "good") -> None:
    """Show `text` on the next page this browser opens, also after a redirect."""
    request.state.flashes = [*getattr(request.state, "flashes", []), [kind, text]]


def pack_messages(messages: list[list[str]]) -> str:
    return str(_signer().dumps(messages[-5:]))


def take_messages(request: Request) -> list[list[str]]:
    """The messages waiting for this page. The response then clears their cookie."""
    waiting = list(getattr(request.state, "flashes", []))
    request.state.flashes = []
    if cookie := request.cookies.get(messages_cookie()):
        request.state.forget_messages = True
        waiting = [*_unpack(cookie), *waiting]
    return waiting


def _unpack(cookie: str) -> list[list[str]]:
    from itsdangerous import BadData

    try:
        return list(_signer().loads(cookie))
    except BadData:
        return []


def _signer() -> Any:
    from itsdangerous import URLSafeSerializer

    from app.kit.secret import secret

    return URLSafeSerializer(secret(), salt="messages")


def theme(request: Request) -> str:
    """`light`, `dark`, or empty: the system decides."""
    chosen = request.cookies.get("luthier_theme", "")
    return chosen if chosen in ("light", "dark") else ""


# Filters. `static/js/format.js` says the same for live parts. ----------------------------------------------------------


def as_json(value: Any, indent: int | None = None) -> str:
    """JSON for people to read: keys in their own order and without escapes. `tojson` is for scripts."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


KINDS = {
    "generic": mark("Base"),
    "instruction": mark("Instruct"),
    "dialogue": mark("Chat"),
    "classifier": mark("Classifier"),
    "encoder": mark("Embedding"),
    "reward": mark("Reward"),
}


def kind_word(kind: str) -> str:
    """The display name of a model's kind."""
    return gettext(KINDS[kind]) if kind in KINDS else kind


def markdown(text: str | None) -> Markup:
    """Markdown as safe HTML: rendered first, then sanitized, since the sanitizer must see what the browser will see."""
    return Markup(_clean(_parser().render(text or "")))  # noqa: S704  nh3 is what makes it safe


@cache
def _parser() -> Any:
    from markdown_it import MarkdownIt

    return MarkdownIt("commonmark", {"html": False}).enable(["table", "strikethrough"])


def _clean(html: str) -> str:
    import nh3

    # No images: loading one tells another host that this text was read.
    tags = {"p", "br", "hr", "em", "strong", "s", "code", "pre", "blockquote", "ul", "ol", "li", "a"}
    tags |= {"h1", "h2", "h3", "h4", "h5", "h6", "table", "thead", "tbody", "tr", "th", "td"}
    return nh3.clean(html, tags=tags, attributes={"a": {"href", "title"}}, url_schemes={"http", "https", "mailto"})


def ticks(text: Any) -> Markup:
    """Plain text in which `words in backticks` are shown as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))  # noqa: S704  escaped before
