"""What the documents say is there is there: commands and their options, modules, make targets, files and what is in them, settings,
requests, links, and code that can be read."""

from __future__ import annotations

import ast
import itertools
import re
import shlex
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from app.settings import PROJECT, Settings

DOCUMENTS = sorted([*PROJECT.glob("*.md"), *PROJECT.glob("docs/**/*.md"), PROJECT / "samples" / "README.md"])
DOCUMENTS = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]  # it tells of what was
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
FOLDERS = ("app", "worker", "tests", "benchmarks", "deploy", "docs", "templates", "static", "migrations", "samples")
PACKAGES_OF_OTHERS = {"pytest", "pip", "ensurepip", "torch.distributed.run"}
each_document = pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(PROJECT)))


@cache
def prose(document: Path) -> str:
    return FENCE.sub("", document.read_text())


@cache
def spans(document: Path) -> list[str]:
    """What stands between backticks in the text."""
    return re.findall(r"`([^`\n]+)`", prose(document))


def blocks(document: Path, *languages: str) -> Iterator[str]:
    for language, body in FENCE.findall(document.read_text()):
        if language in languages:
            yield body


def commands(document: Path) -> Iterator[list[str]]:
    """The words of every command in blocks and between backticks, without comments, redirections and the signs of what is optional."""
    lines = [line for body in blocks(document, "bash") for line in body.replace("\\\n", " ").splitlines()]
    for line in lines + [span for span in spans(document) if " " in span]:
        for command in re.split(r"&&|;|\|", re.sub(r"(\w)\|(\w)", r"\1,\2", line)):
            try:
                words = shlex.split(re.sub(r"(?<=\s)\[|\](?=\s|$)", " ", command), comments=True)
            except ValueError:
                continue  # a span that is no command
            while words and re.fullmatch(r"\w+=\S*|export", words[0]):
                words.pop(0)
            if words and words[:2] == ["uvx", "--from"]:
                words = words[3:]
            if words:
                yield [words[0].removeprefix(".venv/bin/"), *words[1 : words.index(">") if ">" in words else None]]


@cache
def command_line() -> Any:
    import typer

    from app.cli import app

    return typer.main.get_command(app)


def missing_of_luthier(words: list[str]) -> str:
    """What `luthier WORDS…` names that is not there."""
    found, options = command_line(), {"--help"}
    for word in words:
        if word.startswith("--"):
            options |= {name for parameter in found.params for name in (*parameter.opts, *parameter.secondary_opts)}
            if word.partition("=")[0] not in options:
                return f"the option {word} of {found.name}"
        elif hasattr(found, "commands") and re.fullmatch(r"[a-z-]+", word):
            if word not in found.commands:
                return f"the command {word}"
            found = found.commands[word]
    return ""


def missing_of_module(name: str, words: list[str]) -> str:
    """What `python -m NAME WORDS…` names that is not there. A module's options stand in its source, or in that of one it is built on."""
    if name in PACKAGES_OF_OTHERS:
        return ""
    base = PROJECT / name.replace(".", "/")
    file = base.with_suffix(".py") if base.with_suffix(".py").is_file() else base / "__main__.py"
    if not file.is_file():
        return f"the module {name}"
    near = "".join(path.read_text() for path in file.parent.glob("*.py"))
    gone = [word for word in words if word.startswith("--") and f'"{word}"' not in near]
    return f"{', '.join(gone)} of {name}" if gone else ""


def missing_of(words: list[str]) -> str:
    program, rest = words[0], words[1:]
    if program == "luthier":
        return missing_of_luthier(rest)
    if program == "python" and rest[:1] == ["-m"]:
        return missing_of_module(rest[1], rest[2:])
    if program == "celery":
        return "" if (PROJECT / f"{rest[rest.index('-A') + 1].replace('.', '/')}.py").is_file() else "the application"
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (PROJECT / "Makefile").read_text(), re.M)
        return next((f"the target {word}" for word in rest if re.fullmatch(r"[a-z-]+", word) and word not in targets), "")
    if program == "pip":
        known = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        asked = [name for word in rest for names in re.findall(r"(?:^\.|luthier\S*)\[([\w,]+)\]", word) for name in names.split(",")]
        gone = [name for name in asked if name not in known]
        files = [word for flag, word in itertools.pairwise(rest) if flag in ("-c", "-r") and not (PROJECT / word).is_file()]
        return ", ".join(gone + files)
    return ""


@each_document
def test_commands_and_their_options_exist(document):
    gone = {" ".join(words): what for words in commands(document) if (what := missing_of(words))}
    assert not gone


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("luthier upp", "command upp"),
        ("luthier up --prot 1", "--prot"),
        ("luthier models add NAME [--path FOLDER] [--accept-terms]", ""),
        ("luthier keys crate NAME", "command crate"),
        ("python -m benchmarks.nothing", "module"),
        ("python -m benchmarks.training [--shape 14m]", ""),
        ("python -m benchmarks.training --shapes", "--shapes"),
        ("make tests", "target tests"),
        ("pip install '.[embedded,cuda]' && luthier up", "cuda"),
    ],
)
def test_a_wrong_command_is_seen(line, what, tmp_path):
    (tmp_path / "page.md").write_text(f"Run `{line}` now.\n\n```bash\n{line}   # a comment --with-an-option\n```\n")
    found = [missing_of(words) for words in commands(tmp_path / "page.md")]
    said = [word for word in found if word]
    assert len(said) == (2 if what else 0) and all(what in word for word in said), found


@each_document
def test_files_and_what_is_in_them_exist(document):
    gone = [span for span in spans(document) if not span_exists(span)]
    assert not gone


def span_exists(span: str) -> bool:
    """False for a path of ours, `path:Name` or `path::test` that is not there. Patterns and placeholders are passed over."""
    path, _, name = span.partition("::" if "::" in span else ":")
    top, slash, _ = path.partition("/")
    if not slash or top not in FOLDERS or not re.fullmatch(r"[\w./-]+", path) or re.search(r"[A-Z]{3,}(?![A-Z]|\.md)", path):
        return True
    file = PROJECT / path
    if not file.exists():
        return False
    return not name or file.suffix != ".py" or name.partition("[")[0] in names_in(file)


@cache
def names_in(file: Path) -> set[str]:
    tree = ast.parse(file.read_text())
    found = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    return found | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def test_a_file_that_is_not_there_is_seen():
    assert span_exists("app/settings.py:Settings") and span_exists("tests/test_docs.py::test_a_file_that_is_not_there_is_seen")
    assert (
        span_exists("app/")
        and span_exists("benchmarks/NOTES.md")
        and span_exists("runs/<job>/a1")
        and span_exists("app/strategies/NAME.py")
    )
    assert (
        not span_exists("app/setings.py") and not span_exists("app/settings.py:Setings") and not span_exists("tests/test_docs.py::test_it")
    )
    assert not span_exists("benchmarks/NOTE.md")


@each_document
def test_settings_exist(document):
    fields = {f"LUTHIER_{name.upper()}" for name in Settings.model_fields}
    others = {"LUTHIER_API_KEY", "LUTHIER_STUDIO", "LUTHIER_CONFINED"}  # read where no setting can be: by a client, and in children
    assert all(any(name in path.read_text() for path in PROJECT.glob("app/**/*.py")) for name in others)
    named = set(re.findall(r"LUTHIER_[A-Z_]*[A-Z]", document.read_text()))
    assert not named - fields - others


@cache
def requests_there_are() -> list[tuple[set[str], re.Pattern[str]]]:
    from app.main import create_app
    from app.web.navigation import each_route

    routes = [(getattr(route, "methods", None), path) for path, route in each_route(create_app().router)]
    return [(methods, re.compile(re.sub(r"\{[^}]*\}", "[^/]+", path))) for methods, path in routes if methods]


@each_document
def test_requests_exist(document):
    asked = re.findall(r"`(GET|POST|PUT|PATCH|DELETE|HEAD) (/[^\s`?]*)", document.read_text())
    gone = [f"{method} {path}" for method, path in asked if "…" not in path and not answered(method, path)]
    assert not gone


def answered(method: str, path: str) -> bool:
    return any(method in methods and pattern.fullmatch(path) for methods, pattern in requests_there_are())


def test_a_request_that_nobody_answers_is_seen():
    assert answered("POST", "/v1/files") and answered("GET", "/v1/files/{id}/report") and answered("GET", "/healthz")
    assert not answered("PUT", "/v1/files") and not answered("GET", "/v1/file")


@each_document
def test_links_lead_somewhere(document):
    gone = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(document)):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        file = (document.parent / path).resolve() if path else document
        if not file.exists() or (anchor and file.suffix == ".md" and anchor not in anchors(file)):
            gone.append(target)
    assert not gone


@cache
def anchors(document: Path) -> set[str]:
    """What a reader of Markdown on the web makes of its headings, and those it names itself."""
    headings = re.findall(r"^#+ (.+)$", prose(document), re.M)
    named = set(re.findall(r'\b(?:id|name)="([^"]+)"', prose(document)))
    return named | {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()).replace(" ", "-") for heading in headings
    }


@each_document
def test_code_can_be_read(document):
    for body in blocks(document, "python"):
        ast.parse(body)


def test_there_is_something_to_check():
    """A pattern that finds nothing would find every document right."""
    assert sum(1 for document in DOCUMENTS for words in commands(document) if words[0] in ("luthier", "python", "make", "pip")) > 50
    assert sum(1 for document in DOCUMENTS for span in spans(document) if span.startswith(("app/", "tests/"))) > 100
    assert sum(1 for document in DOCUMENTS for _ in blocks(document, "python")) >= 2
