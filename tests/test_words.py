"""The words that people read are the field's: what is listed here has a usual name, and is not said otherwise."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.settings import PROJECT

INSTEAD = {
    r"order(s|ed|ing)? (a|an|the|this|that|another|one) ?(job|model|run|fine-tune)?s?|(job|model)s? (is |was )?ordered": "create or start a job",
    r"(an|such an|your) orders?(?! of\b)|orders? (for a job|refused)": "the job, its configuration, or the request",
    r"learnt": "learned, or trained",
    r"to learn from": "to train on, or training rows",
    r"(what|that|which|always|hardly) learns": "trained, or trainable",
    r"learns? (to|a|the|its|from|only|as|everything|with|nothing|by heart)\b": "trains, is trained on, or memorizes",
    r"(nothing|little|answer|everything|much) to learn": "no trainable tokens, or room to improve",
    r"stands? (ready|beside|between|before|in|on|at|for|there|today)|stood (in|on|at|beside)": "is, is loaded, next to",
    r"mend(s|ed|ing)?|mendable": "fix",
    r"ways? out": "Suggested fix",
    r"(left|leaves?|leaving|takes?|taken)( it| them)? out": "exclude, remove, omit",
    r"(good|bad) rows?|no row is good": "valid rows, invalid rows",
    r"held[- ]out (from|rows?|data|examples?|set|lines?|fraction|column)|share held[- ]out": "validation rows, validation split",
    r"rows? to check with|checked with": "validation set, evaluated on",
    r"(?<!fine-)(?<!instruction-)(?<!dialogue-)(?<!Not to )(?<!To )tuned?|(?<!fine-)tunes|(before|after|without|worth|while|until) tuning": "fine-tune, fine-tuned",
    r"licence[sd]?|colour\w*|behaviour\w*|favour\w*|catalogues?|grey|centre[sd]?": "American spelling",
    r"\w*(normalis|recognis|serialis|initialis|optimis|organis|summaris|quantis|tokenis|memoris|minimis|maximis)\w+": "American spelling: -ize",
    r"(mis)?labell(ed|ing)|travell\w+": "labeled, mislabeled: one l",
    r"figures?": "numbers, metrics, values",
    r"by heart": "memorize, overfit",
    r"side by side with its base|beside its base|beside the base": "next to, compared with the base model",
    r"was said|is said|are told|is not told|what it says|what they say": "shown, reported, results",
    r"asks? (it|the model|them) (a|by|for|with)": "send a request, prompt",
    r"what it forgot|forgets? nothing": "general ability: dropped, unchanged",
    r"beside": "next to, compared with, in addition to",
    r"(cannot|can|could not|may|to) be (fore)?told|is told|told apart|foretold|nobody (knows|can say)": "unclear, predicted, distinguished",
    r"(several|which|other|two|more|more than \d+|every) strateg(y|ies)": "methods (the API's field stays `strategy`)",
    r"woven|wavers|slipped in|squeezed|wholly its own": "plain technical words",
    r"put away|made ready|under way": "unloaded, preparing, running",
    r"(ticked|no row is ticked|tick)(?= (ones|rows|findings|runs|datasets|comparisons|at least))": "selected",
    r"which strategy": "method (the API's field stays `strategy`)",
    r"look again": "refresh",
    r"take (it|them) back|(the|a) deed": "undo, delete, action",
    r"longest length": "max sequence length",
    r"(\d+(\.\d+)?|\})[ \u00a0\u202f]%": "percent without a space, by human_percent or the filter",
}
"""Words that are not used any more, as patterns of whole words in any case, and what is said instead."""

LABELS = {
    "Waiting": "queued",
    "Starting": "queued or running",
    "Stopped": "cancelled",
    "Finished": "succeeded",
    "Ended": "succeeded, failed or cancelled",
    "Weight": "Severity (of an issue); a weight of a model says which",
    "Findings": "Issues",
    "Figures": "Metrics",
    "State": "Status",
    "Made": "Created",
    "Ordered": "Created",
    "Join": "Combine",
    "Learns": "Trainable parameters",
}
"""Words that are wrong as the whole of a label or status, and right inside a sentence."""

SHOWN_ATTRIBUTES = ("title", "alt", "placeholder", "aria-label", "label", "data-label", "hx-confirm", "data-confirm")
KEY = re.compile(r"[a-z_]+")
"""A string that is one lower-case word is a key, a class or a stored value: those keep their names."""

INDEX = re.compile(r"""\[["']\w+["']\]""")
"""A stored key in a line of code that people may copy."""

PLACEHOLDER = re.compile(r"%\(\w+\)s")
"""The name of a value in a message, in whose place people read the value."""

LITERAL = re.compile(r'"(?:[^"\\\n]|\\.)*"' + r"|'(?:[^'\\\n]|\\.)*'" + r"|`(?:[^`\\]|\\.)*`")

FORBIDDEN = [(re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE), instead) for pattern, instead in INSTEAD.items()]


def unseen(node: ast.AST) -> Iterator[ast.AST]:
    """Strings under a node that nobody is shown: docstrings, but for those of routes and commands; comments of tables; assertions."""
    command = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and any(isinstance(mark, ast.Call) for mark in node.decorator_list)
    body = getattr(node, "body", None)
    for line in body[command:] if isinstance(body, list) else []:
        if isinstance(line, ast.Expr):
            yield line.value
    if isinstance(node, ast.keyword) and node.arg == "comment":
        yield node.value
    if isinstance(node, ast.Assert) and node.msg:
        yield from ast.walk(node.msg)


def messages(source: str) -> Iterator[tuple[int, str]]:
    """The strings of a Python file that people may read, those of routes and commands included."""
    nodes = list(ast.walk(ast.parse(source)))
    hidden = {found for node in nodes for found in unseen(node)}
    for node in nodes:
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in hidden and not KEY.fullmatch(node.value):
            yield node.lineno, INDEX.sub("", PLACEHOLDER.sub("…", node.value))


def blank(found: re.Match[str]) -> str:
    return re.sub(r"[^\n]", " ", found[0])


def literals(code: str) -> str:
    """Code with all but its strings blanked, and those that are keys: the lines stay where they are."""
    kept, last = [], 0
    for found in LITERAL.finditer(code):
        kept.append(re.sub(r"[^\n]", " ", code[last : found.start()]))
        kept.append(blank(found) if KEY.fullmatch(found[0][1:-1]) else f"\0{found[0][1:-1]}\0")
        last = found.end()
    return "".join(kept) + re.sub(r"[^\n]", " ", code[last:])


def attribute(found: re.Match[str]) -> str:
    return f"{found[1]}\0{found[3]}\0" if found[2] in SHOWN_ATTRIBUTES else blank(found)


def template_text(source: str) -> str:
    """What a template shows: its text, the strings in its tags, and the attributes that browsers show."""
    text = re.sub(r"\{#.*?#\}", blank, source, flags=re.DOTALL)
    text = re.sub(r"\{[{%].*?[%}]\}", lambda found: literals(found[0]), text, flags=re.DOTALL)
    text = re.sub(r'(\s)([a-z@:-]+)="([^"]*)"', attribute, text)
    return re.sub(r"</?[a-z][^<>]*>", lambda found: found[0] if "\0" in found[0] else "\0" + blank(found)[1:], text)


def document_text(source: str) -> str:
    """A document without the names of fields and schemas."""
    return re.sub(r"`\w+`|<a id=\"\w+\"></a>\w+|\[\w+\]\(#\w+\)", blank, source)


def script_text(source: str) -> str:
    return literals(re.sub(r"/\*.*?\*/|(?m:^\s*//.*$)", blank, source, flags=re.DOTALL))


def passages(path: Path) -> Iterator[tuple[int, str]]:
    """What people may read of a file, with the line on which it begins."""
    source = path.read_text()
    if path.suffix == ".py":
        yield from messages(source)
        return
    text = {".html": template_text, ".js": script_text, ".md": document_text}[path.suffix](source)
    yield from enumerate(text.splitlines(), start=1)


def wrong_words(text: str) -> Iterator[tuple[str, str]]:
    for pattern, instead in FORBIDDEN:
        yield from ((found[0], instead) for found in pattern.finditer(text))
    yield from ((piece.strip(), LABELS[piece.strip()]) for piece in text.split("\0") if piece.strip() in LABELS)


def files() -> list[Path]:
    return [
        *(path for folder in ("app", "worker") for path in sorted((PROJECT / folder).rglob("*.py"))),
        *sorted((PROJECT / "templates").rglob("*.html")),
        *sorted((PROJECT / "static" / "js").glob("*.js")),
        *(PROJECT / name for name in ("README.md", "SECURITY.md")),
        *sorted((PROJECT / "docs").glob("*.md")),
    ]


@pytest.mark.long
def test_people_read_the_words_of_the_field():
    found = [
        f"{path.relative_to(PROJECT)}:{line}: “{phrase}”, say: {instead}"
        for path in files()
        for line, text in passages(path)
        for phrase, instead in wrong_words(text)
    ]
    assert not found, "\n".join(["", *found])


JOB = re.compile(r"(?<![\w/.&-])jobs?(?![\w/=-]|\.\w| =| stacked)", re.IGNORECASE)
"""The API's word in a sentence; names of classes, files and variables, addresses and code to copy keep it."""


def test_pages_say_run_where_the_api_says_job():
    """But for the sentences of a job's events and errors, which both show."""
    views = [path for path in (PROJECT / "app" / "views").glob("*.py") if path.name != "job_json.py"]
    found = [
        f"{path.relative_to(PROJECT)}:{line}: “{text[max(0, word.start() - 30) : word.end() + 30]}”, say: run"
        for path in (*sorted((PROJECT / "templates").rglob("*.html")), *sorted((PROJECT / "static" / "js").glob("*.js")), *sorted(views))
        for line, text in passages(path)
        for word in JOB.finditer(text)
    ]
    assert not found, "\n".join(["", *found])
    assert [word[0] for word in JOB.finditer("A job ends. Jobs: /jobs/new?a&job=b client.fine_tuning.jobs.create")] == ["job", "Jobs"]


@pytest.mark.parametrize(
    ("name", "source", "phrase"),
    [
        ("a.py", 'raise Refused(\n    f"{n} rows were left out"\n)', "left out"),
        ("a.py", '@app.get("/a")\ndef a():\n    """Order a job."""', "Order a job"),
        ("a.py", 'LABEL = "Finished"', "Finished"),
        ("a.html", '<p>\n{{ plural(n, "good row") }}</p>', "good row"),
        ("a.html", '<p title="The\nlicence">', "licence"),
        ("a.html", "<p>\n<b>{{ n }}</b> rows to check with</p>", "rows to check with"),
        ("a.html", "<td>\n<b>Ended</b>", "Ended"),
        ("a.js", '\nsay("Stopped", `${n} tuned`);', "Stopped"),
        ("a.md", "# A\nWhat learns", "What learns"),
        ("a.html", "<p>At 2.5 % of it</p>", "2.5 %"),
    ],
)
def test_a_planted_word_is_found(tmp_path, name, source, phrase):
    """The test above would pass on an empty list of files too."""
    (tmp_path / name).write_text(source)
    assert phrase in [word for _, text in passages(tmp_path / name) for word, _ in wrong_words(text)]


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("a.py", '"""What was left out."""\ndef a():\n    """Mends."""\n    return row["learnt"]'),
        ("a.html", '{# left out #}<p class="coloured learns" aria-labelledby="a">{{ row["learnt"] }}{% if a.left_out %}'),
        ("a.js", "// left out\nrow.learnt = 'learnt';"),
        ("a.md", "The training has finished. A fine-tuned model: `tuned`."),
    ],
)
def test_code_keeps_its_names(tmp_path, name, source):
    (tmp_path / name).write_text(source)
    assert [word for _, text in passages(tmp_path / name) for word, _ in wrong_words(text)] == []
