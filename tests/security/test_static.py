"""What the code never does, read from the code itself (S1, S2, S6, S15): pickled weights, remote code, shells, `eval`, markup that is taken as safe,
and dependencies that bring a door of their own."""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterator

import pytest

from app import queue
from tests.conftest import PROJECT

FORBIDDEN_IMPORTS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
FORBIDDEN_CALLS = {"eval", "exec", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load", "pandas.read_pickle"}
DOORS = {"flower", "tensorboard-plugin", "ray", "jupyter", "gradio", "streamlit"}
"""Packages that open a web page of their own without our sign-in, or that run what is sent to them."""


def faults_of(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"line {node.lineno}: imports {name}" for name in names if name.split(".")[0] in FORBIDDEN_IMPORTS)
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {word.arg: ast.unparse(word.value) for word in node.keywords}
            if called in FORBIDDEN_CALLS:
                yield f"line {node.lineno}: calls {called}"
            if called == "torch.load" and given.get("weights_only") != "True":
                yield f"line {node.lineno}: torch.load without weights_only=True"
            yield from (
                f"line {node.lineno}: {name}={given[name]}"
                for name in ("shell", "trust_remote_code", "allow_pickle")
                if given.get(name) == "True"
            )


def files() -> list[str]:
    return [path.relative_to(PROJECT).as_posix() for folder in ("app", "worker") for path in sorted((PROJECT / folder).rglob("*.py"))]


def test_nothing_pickled_no_shell_and_no_remote_code():
    found = {file: list(faults_of((PROJECT / file).read_text())) for file in files()}
    assert len(found) > 300
    assert not {file: faults for file, faults in found.items() if faults}


@pytest.mark.parametrize(
    "source",
    [
        "import pickle", "from joblib import load", "eval('1')", "os.system('ls')", "yaml.load(x)", "torch.load(x)", "torch.load(x, weights_only=False)",
        "np.load(x, allow_pickle=True)", "subprocess.run(x, shell=True)", "AutoModel.from_pretrained(x, trust_remote_code=True)",
    ],
)  # fmt: skip
def test_each_of_them_is_seen(source):
    assert list(faults_of(source))


def test_what_is_allowed_is_not_named():
    assert not list(faults_of("torch.load(x, weights_only=True)\nnp.load(x)\nmodel.eval()\nyaml.safe_load(x)"))


def test_no_template_takes_markup_as_safe():
    """`| safe` of anything but a literal would show what somebody wrote as HTML; code makes HTML as `Markup`, which escapes."""
    unsafe = re.compile(r"""[^'"\s]\s*\|\s*safe\b|autoescape\s+false""")
    found = {path.name: unsafe.findall(path.read_text()) for path in sorted((PROJECT / "templates").rglob("*.html"))}
    assert unsafe.search("{{ name | safe }}") and not unsafe.search("{{ ' hidden' | safe if x }}")
    assert len(found) > 50 and not {name: words for name, words in found.items() if words}


def test_no_dependency_opens_a_door_of_its_own():
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    every = [*project["dependencies"], *(name for group in project["optional-dependencies"].values() for name in group)]
    names = {re.split(r"[<>=!~\[; ]", line)[0].lower() for line in every}
    assert len(names) > 20 and not names & DOORS


def test_messages_are_json_alone_and_no_result_is_kept():
    """A broker that somebody else writes to can make a worker unpickle nothing (S16)."""
    conf = queue.celery.conf
    assert (conf.task_serializer, list(conf.accept_content), conf.result_backend) == ("json", ["json"], None)
