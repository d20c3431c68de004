"""The languages of the pages: which one a request is answered in, and its translations.

English is the source: every text is written in English where it is needed, inside `gettext` or `ngettext` (in templates `_` and
`{% trans %}`), and `app/locale/xx.po` holds it in another language. A text that has to stand in a constant is marked with `mark` there and
translated where it is shown. Only pages are translated: the API, logs, workers and what is stored speak English, because
`current` is set for requests of pages alone.
"""

from __future__ import annotations

import gettext as standard
import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import Any

SOURCE = "en"
LANGUAGES = {SOURCE: "English", "de": "Deutsch", "zh": "简体中文"}
"""Every language of the interface under its tag, by its own name."""
LOCALES = {SOURCE: "en", "de": "de", "zh": "zh_Hans_CN"}
FOLDER = Path(__file__).parent / "locale"

current: ContextVar[str] = ContextVar("language", default=SOURCE)
"""The language of the page that is being made. `app.web.middleware` sets it."""


def gettext(message: str, /, **values: Any) -> str:
    """`message` in the current language, with `%(name)s` replaced by `values`. Without values a percent sign is only itself."""
    language = current.get()
    text = message if language == SOURCE or not message else _catalog(language).gettext(message)  # "" has the catalog's own header
    return text % values if values else text


def ngettext(one: str, many: str, num: int, /, **values: Any) -> str:
    """The form for `num` of a message that counts; `%(num)s` is the number as people write it."""
    language = current.get()
    text = (one if num == 1 else many) if language == SOURCE else _catalog(language).ngettext(one, many, num)
    return text % ({"num": localized(f"{num:,.0f}")} | values)


@contextmanager
def english() -> Iterator[None]:
    """Within this block texts are English: those that are stored, or written into a file, while a page is answered."""
    token = current.set(SOURCE)
    try:
        yield
    finally:
        current.reset(token)


def mark(message: str) -> str:
    """Marks a constant for the catalogs and returns it as it is: `gettext` translates it where it is shown."""
    return message


def chosen(cookie: str, accepted: str) -> str:
    """The language of a person: what they chose, else the first that their browser asks for and we have, else English.

    `accepted` is an `Accept-Language` header; a quality of 0 rules a language out, and only simplified Chinese is ours.
    """
    if cookie in LANGUAGES:
        return cookie
    wanted: list[tuple[float, str]] = []
    for part in accepted.split(",")[:20]:
        tag, _, parameter = part.strip().lower().partition(";")
        quality = re.fullmatch(r"\s*q\s*=\s*([01](?:\.\d{0,3})?)\s*", parameter) if parameter else None
        weight = float(quality[1]) if quality else 0.0 if parameter else 1.0
        base, _, rest = tag.partition("-")
        traditional = base == "zh" and any(part in ("hant", "tw", "hk", "mo") for part in rest.split("-"))
        if base in LANGUAGES and weight > 0 and not traditional:
            wanted.append((-weight, base))
    return min(wanted, key=lambda one: one[0])[1] if wanted else SOURCE


@cache
def separators(language: str) -> tuple[str, str]:
    """The sign between thousands and the decimal sign."""
    from babel import Locale

    symbols = Locale.parse(LOCALES[language]).number_symbols["latn"]
    return symbols["group"], symbols["decimal"]


def localized(number: str) -> str:
    """A number as English writes it, `1,204.5`, with the separators of the current language."""
    language = current.get()
    if language == SOURCE:
        return number
    group, decimal = separators(language)
    return number.translate({ord(","): group, ord("."): decimal})


def lowered(title: str) -> str:
    """A title in the current language as a part of a sentence: only English then writes it in lower case."""
    return title.lower() if current.get() == SOURCE else title


@cache
def words(language: str) -> dict[str, str]:
    """The messages of `static/js/` in `language`, which a page hands to its scripts; nothing for English."""
    if language == SOURCE:
        return {}
    catalog = _read(language)
    return {
        str(one.id): str(one.string)
        for one in catalog
        if isinstance(one.id, str) and one.id and any(file.startswith("static/js/") for file, _ in one.locations)
    }


@cache
def _catalog(language: str) -> standard.GNUTranslations:
    from babel.messages.mofile import write_mo

    file = io.BytesIO()
    write_mo(file, _read(language))
    file.seek(0)
    return standard.GNUTranslations(file)


@cache
def _read(language: str) -> Any:
    from babel.messages.pofile import read_po

    with (FOLDER / f"{language}.po").open("rb") as file:
        return read_po(file, locale=LOCALES[language])
