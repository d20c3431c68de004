"""What somebody might try with a grader: each ends within seconds, as an error, and leaves nothing behind."""

import resource
import subprocess
import sys
import time

import pytest

from app import graders
from app.errors import BadField
from app.graders import GradedSample
from app.kit.confinement import Confinement, confined
from app.settings import PROJECT

SECONDS = 4.0
"""Of one attack: the limit of the code, the grace of its process, and a slow machine."""

CODE = {
    "read a file": "open('/etc/passwd').read()",
    "read by pathlib": "from pathlib import Path\n    Path('/etc/passwd').read_text()",
    "write a file": "open('{mark}', 'w').write('x')",
    "list a folder": "import os\n    os.listdir('/')",
    "the environment": "import os\n    os.environ['PATH']",
    "a process": "import os\n    os.system('touch {mark}')",
    "a process by exec": "import os\n    os.execv('/bin/sh', ['sh'])",
    "kill": "import os\n    os.kill(1, 9)",
    "an endless loop": "while True:\n        pass",
    "a loop that catches": "while True:\n        try:\n            while True:\n                pass\n        except BaseException:\n            pass",
    "a list of 16 GB": "x = [0] * (2 << 30)",
    "a text of 16 GB": "x = 'a' * (16 << 30)",
    "a list that grows": "x = []\n    while True:\n        x.append('a' * 1000000)",
    "deep recursion": "f = lambda n: f(n + 1)\n    f(0)",
    "a huge power": "x = 9 ** 9 ** 9",
    "a huge format": "x = '{:>1000000000}'.format(1)",
    "a huge replacement": "x = ('a' * 10000).replace('a', 'b' * 100000)",
    "a catastrophic regex": "import re\n    re.match('(a+)+$', 'a' * 40 + 'b' * 2)\n    re.match('(a|a)*$', 'a' * 5000 + 'b')\n    raise ValueError",
    "sleep": "import time\n    while True:\n        time.sleep(100)",
    "endless printing": "while True:\n        print('x' * 10000)",
    "the classes of a value": "().__class__.__bases__[0].__subclasses__()",
    "the globals of a function": "grade.__globals__",
    "the frame of an error": "try:\n        1 / 0\n    except Exception as e:\n        e.__traceback__.tb_frame",
    "the module behind a host function": "from rapidfuzz import fuzz\n    fuzz.ratio.__globals__",
    "a host function that is given no text": "from rapidfuzz import fuzz\n    fuzz.ratio([1] * 1000, {})",
    "a host function that is given too much": "from rapidfuzz import fuzz\n    fuzz.ratio('a' * 30000, 'b' * 30000)",
    "a host function in a loop": "from rapidfuzz import fuzz\n    while True:\n        fuzz.ratio('a', 'b')",
    "a slow host function in a loop": "from rapidfuzz import distance\n    a, b = 'ab' * 10000, 'ba' * 10000\n    while True:\n        distance.DamerauLevenshtein.distance(a, b)",
    "a processor of one's own": "from rapidfuzz import fuzz\n    fuzz.ratio('a', 'b', processor=lambda text: text)",
    "a value that does not end": "x = []\n    x.append(x)\n    return x",
    "a result of many megabytes": "return ['a' * 1000] * 50000",
    "eval of a file": "eval(\"open('/etc/passwd').read()\")",
}
ABSENT = (
    "socket",
    "subprocess",
    "urllib.request",
    "ctypes",
    "multiprocessing",
    "threading",
    "importlib",
    "builtins",
    "gc",
    "signal",
    "shutil",
    "pickle",
)


@pytest.mark.parametrize("name", CODE)
def test_code_is_held(name, tmp_path):
    mark = tmp_path / "mark"
    source = f"def grade(sample, item):\n    {CODE[name].replace('{mark}', str(mark))}\n    return 1.0\n"
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        grader = graders.read({"type": "python", "name": "g", "source": source})
    except BadField:
        grader = None  # refused when it is saved
    if grader is not None:
        found = graders.scored(grader, graders.grade(grader, GradedSample("x"), {}))
        assert found.error is not None and found.score is None, found
        assert "root:" not in str(found)
    assert time.monotonic() - began < SECONDS and not mark.exists()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300 << 10  # KiB
    harmless = graders.read({"type": "python", "name": "g", "source": "def grade(sample, item):\n    return 1.0"})
    assert graders.grade(harmless, GradedSample("x"), {}).reward == 1


@pytest.mark.parametrize("module", ABSENT)
def test_code_has_no_module_that_reaches_out(module):
    with pytest.raises(BadField, match="there is no"):
        graders.read({"type": "python", "name": "g", "source": f"def grade(sample, item):\n    import {module}\n    return 1"})


@pytest.mark.parametrize(
    "source",
    ["(" * 5000 + "1" + ")" * 5000, "-" * 60000 + "1", "[" * 30000, "x = 1\n" * 10000, "a." * 30000 + "b", "lambda: " * 8000 + "1"],
)
def test_a_source_that_breaks_parsers_is_refused(source):
    began = time.monotonic()
    with pytest.raises(BadField):
        graders.read({"type": "python", "name": "g", "source": f"{source}\ndef grad(sample, item): return 1"[: 64 << 10]})
    assert time.monotonic() - began < SECONDS


def test_top_level_code_is_held_when_it_is_saved():
    for source in ("while True: pass", "x = [0] * (2 << 30)", "open('/etc/passwd')"):
        with pytest.raises(BadField):
            graders.read({"type": "python", "name": "g", "source": f"{source}\ndef grade(sample, item): return 1"})


def test_a_process_that_is_killed_is_replaced():
    import psutil

    grader = graders.read({"type": "python", "name": "g", "source": "def grade(sample, item):\n    return 1.0"})
    assert graders.grade(grader, GradedSample("x"), {}).reward == 1
    for child in psutil.Process().children():
        if child.name() == "monty":
            child.kill()
    found = [graders.grade(grader, GradedSample("x"), {}) for _ in range(6)]
    assert found[-1].reward == 1 and found[-1].error is None
    assert all(one.error is None or one.error[0] == "python_grader_server_error" for one in found)


INJECTIONS = (
    "{{item.secret}}",
    "{% for x in y %}",
    "{{ ''.__class__ }}",
    "{{config}}",
    "${7*7}",
    "#{7*7}",
    "{0.__class__}",
    "%(secret)s",
    "{{sample.output_text}}" * 5,
)


@pytest.mark.parametrize("text", INJECTIONS)
def test_what_a_template_is_filled_with_is_data(text):
    same = graders.read(
        {"type": "string_check", "name": "g", "input": "{{sample.output_text}}", "operation": "eq", "reference": "{{item.same}}"}
    )
    assert graders.grade(same, GradedSample(text), {"same": text, "secret": "hunter2"}).reward == 1


def test_a_template_has_no_attributes():
    for name in ("__class__", "keys", "__len__"):
        grader = graders.read({"type": "string_check", "name": "g", "input": f"{{{{item.{name}}}}}", "operation": "ne", "reference": "x"})
        assert graders.grade(grader, GradedSample("x"), {"a": 1}).error[0] == "invalid_variable_error"


def test_a_template_cannot_grow_without_bound():
    grader = graders.read({"type": "string_check", "name": "g", "input": "{{item.a}}" * 1900, "operation": "ne", "reference": "x"})
    assert graders.grade(grader, GradedSample("x"), {"a": "a" * 100_000}).error[0] == "truncated_observation_error"
    began = time.monotonic()
    graders.read({"type": "string_check", "name": "g", "input": "{{" * 9_999, "operation": "ne", "reference": "x"})
    assert time.monotonic() - began < 1


PATTERNS = ("(a+)+$", "(a|aa)+$", "(.*)*x", "(a?){50}a{50}", "^(([a-z])+.)+[A-Z]([a-z])+$", "(x+x+)+y")


@pytest.mark.parametrize("pattern", PATTERNS)
def test_no_expression_takes_longer_than_its_text(pattern):
    grader, began = graders.read({"type": "regex", "name": "g", "pattern": pattern}), time.monotonic()
    assert graders.grade(grader, GradedSample("a" * 200_000 + "!"), {}).error is None
    assert time.monotonic() - began < SECONDS


@pytest.mark.parametrize("pattern", ["((a{100}){100}){100}", "(a{1000}){1000}", r"(a)\1", "(?=a)", "(?<!a)b", "a" * 3000])
def test_an_expression_that_grows_or_goes_back_is_refused(pattern):
    with pytest.raises(BadField):
        graders.read({"type": "regex", "name": "g", "pattern": pattern})


@pytest.mark.parametrize("formula", ["9**9**9", "9^9^9", "9^9^9^9", "exp(exp(exp(9)))", "1e300*1e300", "a^-9999", "(0-1)^0.5", "log(0)", "1/0", "max(" * 60 + "1" + ")" * 60, "-" * 1900 + "1", "9" * 1900])  # fmt: skip
def test_a_formula_is_bounded(formula):
    part, began = {"a": {"type": "length", "name": "a", "max": 9}}, time.monotonic()
    try:
        grader = graders.read({"type": "multi", "name": "g", "graders": part, "calculate_output": formula})
    except BadField:
        pass
    else:
        assert graders.grade(grader, GradedSample("x"), {}).error[0] == "formula_parse_error"
    assert time.monotonic() - began < 1


BOMB = {
    "$defs": {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)} | {"d40": {"type": "null"}},
    "$ref": "#/$defs/d0",
}
LOOP = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/a"}]}}, "$ref": "#/$defs/a"}


@pytest.mark.parametrize("schema", [BOMB, LOOP, {"$ref": "#"}])
def test_a_schema_ends(schema):
    grader, began = graders.read({"type": "json_schema", "name": "g", "schema": schema}), time.monotonic()
    assert graders.grade(grader, GradedSample("1"), {}).error[0] == "other_error"
    assert time.monotonic() - began < SECONDS


def test_a_nested_schema_is_refused():
    schema = {"type": "null"}
    for _ in range(90):
        schema = {"not": schema}
    with pytest.raises(BadField):
        graders.read({"type": "json_schema", "name": "g", "schema": schema})


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 50_000, "9" * 200_000, '"' + "\\ud800" * 1000 + '"', "\x00" * 1000, "<tool_call>" * 20_000]
)
@pytest.mark.parametrize("kind", ["json_schema", "tool_call", "numeric", "text_similarity", "regex"])
def test_hostile_answers_end(kind, text):
    fields = {
        "schema": {"type": "object"},
        "tool": "f",
        "arguments": "{}",
        "reference": "1 2",
        "pattern": "a+",
        "input": "{{sample.output_text}}",
        "evaluation_metric": "rouge_l",
    }
    known = {info.alias or name for name, info in graders.GRADERS[kind].model_fields.items()}
    grader = graders.read({"type": kind, "name": "g", **{name: value for name, value in fields.items() if name in known}})
    began = time.monotonic()
    found = graders.grade(grader, GradedSample(text), {})
    assert found.error is not None or 0 <= found.reward <= 1
    assert time.monotonic() - began < SECONDS


def test_the_similarities_end_on_the_longest_texts():
    from app.kit.similarity import BY_WORDS, MAX_COMPARED

    one, other = "ab " * (MAX_COMPARED // 3), "ba ab " * (MAX_COMPARED // 6)
    for metric in ("fuzzy_match", *BY_WORDS):
        grader = graders.read(
            {
                "type": "text_similarity",
                "name": "g",
                "input": "{{sample.output_text}}",
                "reference": "{{item.r}}",
                "evaluation_metric": metric,
            }
        )
        began = time.monotonic()
        assert graders.grade(grader, GradedSample(one), {"r": other}).error is None
        assert time.monotonic() - began < 2 * SECONDS, metric
        assert graders.grade(grader, GradedSample(one * 2), {"r": other}).error[0] == "truncated_observation_error"


BEHIND_WALLS = """
from app import graders
from app.graders import GradedSample
grader = graders.read({"type": "python", "name": "g", "source": "def grade(sample, item):\\n    return 0.5"})
print(graders.grade(grader, GradedSample("x"), {}).reward)
"""


def test_code_runs_behind_the_walls_of_a_trainer(data_dir):
    room = Confinement(write=[data_dir], sockets="none", memory_bytes=8 << 30)
    command = confined([sys.executable, "-c", BEHIND_WALLS], room)
    done = subprocess.run(
        command, cwd=PROJECT, env={"PATH": "/usr/bin:/bin", "HOME": str(data_dir)}, capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "0.5", done.stderr
