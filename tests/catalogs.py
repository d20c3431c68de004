"""The messages of the interface: extracts them, keeps `app/locale/*.po` current, and finds texts that nobody marked.

python -m tests.catalogs                    update the catalogs from the sources; says how many messages are not translated
python -m tests.catalogs --check FILE …     texts of these files that are not marked
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_file
from babel.messages.pofile import read_po, write_po
from jinja2 import nodes

from app.languages import FOLDER, LOCALES, SOURCE
from app.web.templates import environment

ROOT = Path(__file__).parent.parent
PYTHON_KEYWORDS = {"gettext": None, "ngettext": (1, 2), "mark": None}
JS_KEYWORDS = {"_": None, "ngettext": (1, 2)}
HUMAN_ATTRIBUTES = ("title", "aria-label", "placeholder", "alt", "label", "data-confirm", "hx-confirm", "data-ask")
SILENT_ELEMENTS = ("script", "style", "code", "kbd", "pre", "samp")
ENGLISH_CALLS = (
    "log",
    "ValueError",
    "RuntimeError",
    "TypeError",
    "AssertionError",
    "KeyError",
    "text",
    "Field",
    "Query",
    "Path",
    "Form",
    "Header",
    "Body",
    "File",
)
"""Calls whose texts no reader of a page sees: logs, programming errors, SQL, and the description of the API."""


def sources() -> Iterator[Path]:
    yield from sorted((ROOT / "app").rglob("*.py"))
    yield from sorted((ROOT / "templates").rglob("*.html"))
    yield from sorted((ROOT / "static" / "js").glob("*.js"))


def extracted(paths: Iterable[Path] | None = None) -> Catalog:
    """Every message of the sources with the files it is in."""
    catalog = Catalog(charset="utf-8")
    for path in sources() if paths is None else paths:
        place = path.relative_to(ROOT).as_posix()
        if path.suffix == ".html":
            calls = environment().extract_translations(path.read_text(), gettext_functions=("_", "gettext", "ngettext"))
            found: Iterable[Any] = [(0, message, [], None) for _, _, texts in calls if (message := _message(texts))]
        elif path.suffix == ".js":
            found = extract_from_file("javascript", path, keywords=JS_KEYWORDS)
        else:
            found = extract_from_file("python", path, keywords=PYTHON_KEYWORDS)
        for _, message, comments, context in found:
            catalog.add(message, locations=[(place, 1)], auto_comments=comments, context=context)
    return catalog


def _message(texts: Any) -> str | tuple[str, ...]:
    """The literals of a call in a template, whose other arguments Jinja gives as None: one text, or the two forms of `ngettext`."""
    literals = (texts,) if isinstance(texts, str) else tuple(text for text in texts or () if isinstance(text, str))
    return literals if len(literals) > 1 else "".join(literals)


def update() -> dict[str, int]:
    """Writes the catalogs anew; language → messages without a translation. What is no longer said is dropped."""
    left = {}
    template = extracted()
    for language, locale in LOCALES.items():
        if language == SOURCE:
            continue
        path = FOLDER / f"{language}.po"
        catalog = read_po(path.open("rb"), locale=locale) if path.exists() else Catalog(locale=locale, charset="utf-8")
        catalog.update(template, no_fuzzy_matching=True, update_header_comment=False)
        catalog.obsolete.clear()
        write(path, catalog)
        left[language] = sum(not translated(one) for one in catalog if one.id)
    return left


def write(path: Path, catalog: Catalog) -> None:
    with path.open("wb") as file:
        write_po(file, catalog, width=0, omit_header=False, sort_by_file=True, include_lineno=False, ignore_obsolete=True)


def translated(message: Any) -> bool:
    return all(message.string) if isinstance(message.string, (tuple, list)) else bool(message.string)


# Texts nobody marked --------------------------------------------------------------------------------------------------


def unmarked(path: Path) -> list[str]:
    """Texts of a file that a reader would see and that are in no catalog."""
    return list(_in_template(path.read_text()) if path.suffix == ".html" else _in_python(path.read_text()))


class _Texts(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.silent: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        if self.silent or tag in SILENT_ELEMENTS or given.get("translate") == "no":
            if tag not in ("input", "img", "br", "link", "meta", "hr"):
                self.silent.append(tag)
            return
        self.found += [f'{name}="{given[name]}"' for name in HUMAN_ATTRIBUTES if said(given.get(name) or "")]

    def handle_endtag(self, tag: str) -> None:
        if self.silent and self.silent[-1] == tag:
            self.silent.pop()

    def handle_data(self, data: str) -> None:
        if not self.silent and said(data):
            self.found.append(data.strip())


def said(text: str) -> bool:
    return re.search(r"[A-Za-z]{2,}", text.replace("Luthier", "")) is not None


def _in_template(source: str) -> Iterator[str]:
    plain = re.sub(r"\{#.*?#\}|\{%-?\s*trans\b.*?endtrans\s*-?%\}", "", source, flags=re.DOTALL)
    plain = re.sub(r"\{\{.*?\}\}|\{%.*?%\}", "", plain, flags=re.DOTALL)
    texts = _Texts()
    texts.feed(plain)
    yield from texts.found
    tree = environment().parse(source)
    marked = {
        id(one)
        for call in tree.find_all(nodes.Call)
        if _name(call.node) in ("_", "gettext", "ngettext")
        for one in call.find_all(nodes.Const)
    }
    for constant in tree.find_all(nodes.Const):
        text = constant.value
        if isinstance(text, str) and id(constant) not in marked and re.search(r"^[A-Z][a-z]+|[a-z]{2,} [a-z%]{2,}", text.strip()):
            yield f"{{{{ {text!r} }}}}"


def _name(node: Any) -> str:
    return getattr(node, "name", "")


def _in_python(source: str) -> Iterator[str]:
    tree = ast.parse(source)
    silent: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            silent.add(id(node.value))
        elif isinstance(node, (ast.Call, ast.Assert)):
            called = "assert" if isinstance(node, ast.Assert) else ast.unparse(node.func)
            parts = called.split(".")
            if called == "assert" or parts[-1] in (*PYTHON_KEYWORDS, *ENGLISH_CALLS) or parts[0] in ("log", "logger", "re"):
                silent |= {id(one) for one in ast.walk(node)}
        elif isinstance(node, ast.JoinedStr):
            silent |= {id(one) for one in node.values}
        elif isinstance(node, ast.Subscript) and ast.unparse(node.value) in ("Literal", "Annotated"):
            silent |= {id(one) for one in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in silent:
            continue
        if isinstance(node, ast.JoinedStr):
            text = "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            text = node.value
        else:
            continue
        if re.search(r"[A-Za-z]{2,} [A-Za-z{]|^[A-Z][a-z]+ ?\{", text) and not re.search(
            r"^(SELECT|INSERT|UPDATE|DELETE|WITH|ALTER|CREATE) ", text
        ):
            yield f"{node.lineno}: {text}"


if __name__ == "__main__":
    if sys.argv[1:2] == ["--check"]:
        for name in sys.argv[2:]:
            for text in unmarked((ROOT / name).resolve()):
                print(f"{name}: {text}")
    else:
        for language, count in update().items():
            print(f"{language}: {count} messages without a translation")
