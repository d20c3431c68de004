"""A function of one's own: OpenAI's `grade(sample, item)`, run in Monty."""

from __future__ import annotations

import ast
import builtins
from collections.abc import Iterator
from typing import ClassVar, Literal

from pydantic import Field

from app.errors import BadField, Unavailable
from app.graders import _sandbox
from app.graders._base import JSON, GradedSample, GradeError, Grader, Result, Steps
from app.languages import gettext, mark

MAX_SOURCE = 64 << 10
HINT = mark(
    "It runs in Monty: plain functions with math, re, json, datetime, collections, itertools, functools, random, typing and rapidfuzz; "
    "no files, processes, network, environment, other packages, generators, inheritance or decorators."
)


class PythonGrader(Grader):
    place: ClassVar = 30
    title: ClassVar = "Python"
    summary: ClassVar = mark("A function of your own, grade(sample, item), returns the score.")
    example: ClassVar = {
        "source": 'def grade(sample, item):\n    return 1.0 if sample["output_text"].strip() == item["reference"].strip() else 0.0\n'
    }

    type: Literal["python"]
    source: str = Field(min_length=1, max_length=MAX_SOURCE, description=mark("Python that defines grade(sample, item)."))
    image_tag: Literal["2025-05-08"] | None = Field(
        None, description=mark("OpenAI's name of an environment with rapidfuzz, which is here.")
    )

    def prove(self) -> None:
        """Run it without calling `grade`, and look for what only a call would meet: absent modules and functions."""
        try:
            with _sandbox.session() as running:
                _sandbox.feed(running, self.source)
                for code, absent in _needs(self.source):
                    _try(running, code, absent)
                kind = _sandbox.feed(running, "str(type(grade))")
        except _sandbox.NoProcess as error:
            raise Unavailable(error.message, param="grader.source") from None
        except GradeError as error:
            if "name 'grade'" in error.message:
                said = gettext("The code defines no function grade.")
                raise BadField(said, hint=gettext("Define grade(sample, item)."), param="grader.source") from None
            said = gettext("The code does not run here: %(error)s", error=error.message)
            raise BadField(said, hint=gettext(HINT), param="grader.source") from None
        if "function" not in str(kind):
            raise BadField(gettext("grade is no function."), hint=gettext("Define grade(sample, item)."), param="grader.source")

    def steps(self, sample: GradedSample, item: JSON) -> Steps:
        yield from ()
        return Result(_sandbox.run(self.source, sample.namespace(), item))


def _try(running: object, code: str, absent: str) -> None:
    try:
        _sandbox.feed(running, code)  # type: ignore[arg-type]  # a MontySession, which this module does not import
    except GradeError as error:
        if "NotFoundError" in error.message or "ImportError" in error.message or "NameError" in error.message:
            raise GradeError(error.kind, absent) from None
        raise


def _needs(source: str) -> Iterator[tuple[str, str]]:
    """(snippet that fails where it is absent, what to say then) for each import and each built-in function of a source that Monty has parsed.
    Also checks the parameters of `grade`. Raises BadField."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise BadField(gettext("The code cannot be read."), hint=gettext("Shorten its expressions."), param="grader.source") from None
    for node in tree.body:
        if isinstance(node, ast.AsyncFunctionDef) and node.name == "grade":
            raise BadField(gettext("grade must not be async."), hint=gettext("Define it with def."), param="grader.source")
        if isinstance(node, ast.FunctionDef) and node.name == "grade" and not _takes_two(node.args):
            said = gettext("grade takes two values, sample and item.")
            raise BadField(said, hint=gettext("Define grade(sample, item)."), param="grader.source")
    seen: set[str] = set()
    stored = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    stored |= {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    stored |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.arg)}
    for any_node in ast.walk(tree):
        for code, absent in _of(any_node, stored):
            if code not in seen:
                seen.add(code)
                yield code, absent


def _of(node: ast.AST, stored: set[str]) -> Iterator[tuple[str, str]]:
    if isinstance(node, ast.Import):
        yield from ((f"import {alias.name}", gettext("there is no module %(name)s.", name=alias.name)) for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
        for alias in node.names:
            absent = gettext("there is no %(name)s in a module %(module)s.", name=alias.name, module=node.module)
            yield f"from {node.module} import {alias.name}", absent
    elif isinstance(node, ast.Name) and node.id not in stored and hasattr(builtins, node.id):
        yield node.id, gettext("there is no function %(name)s.", name=node.id)


def _takes_two(given: ast.arguments) -> bool:
    positional = [*given.posonlyargs, *given.args]
    needed = len(positional) - len(given.defaults)
    return (
        needed <= 2
        and (len(positional) >= 2 or given.vararg is not None)
        and len(given.kw_defaults) == sum(d is not None for d in given.kw_defaults)
    )
