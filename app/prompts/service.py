"""Prompts: named templates with immutable versions.

A template is a text with variables: `{{input}}` is the row's question, `{{examples}}` the worked examples, `{{instruction}}` the
step-by-step instruction, `{{labels}}` the labels of the dataset, and any other name one of the prompt's own variables.
Substitution is one pass over the text, so braces in a row's own text stay as they are.
"""

from __future__ import annotations

import math
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app import formats, ownership
from app.errors import BadField, NotFound
from app.jobs.request import bad_field
from app.kit import ids
from app.kit.answers import NUMBER, label_in, number_in, plain
from app.kit.json_safe import storable
from app.languages import gettext, mark
from app.ownership import owned
from app.tables import JSON, Prompt, PromptVersion, User

VARIABLE = re.compile(r"\{\{\s*([A-Za-z_]\w{0,63})\s*\}\}")
OF_ROW = ("input", "examples", "instruction", "labels")
OF_EXAMPLE = ("input", "output", "answer", "instruction", "labels")

Text = Annotated[str, StringConstraints(max_length=20_000)]
Rule = Literal["all", "first_line", "last_line", "after", "last_number"]
Score = Literal["exact", "numeric", "contains", "rouge_l", "label", "grader"]
BUILDERS = {"zero_shot": mark("zero-shot"), "few_shot": mark("few-shot"), "chain_of_thought": mark("chain-of-thought")}
_RULES = {
    "all": mark("whole text"),
    "first_line": mark("first line"),
    "last_line": mark("last line"),
    "after": mark("after the marker"),
    "last_number": mark("last number"),
}
SCORES = {
    "exact": mark("exact match"),
    "numeric": mark("same number"),
    "contains": mark("contains"),
    "rouge_l": "ROUGE-L",
    "label": mark("label"),
    "grader": mark("saved grader"),
}


LABELS = (
    mark("Grader"), mark("Instruction"), mark("Marker"), mark("Max tokens"), mark("Samples"), mark("Temperature"), mark("Variables"),
)  # fmt: skip
"""What `app.kit.forms.label_of` makes of the names of fields that have no title, for the catalogs."""


class PromptBody(BaseModel):
    """What one version says: the template, how its examples are found, and how an answer is read and scored."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    builder: Literal["zero_shot", "few_shot", "chain_of_thought"] = Field(
        "zero_shot",
        title=mark("Strategy"),
        description=mark(
            "Zero-shot: the question alone. Few-shot: examples before it. Chain-of-thought: the model reasons before it answers."
        ),
        json_schema_extra={"words": {**BUILDERS}},
    )
    system: Text = Field(
        "", title=mark("System prompt"), description=mark("For models that take one; put before the text for a base model.")
    )
    template: Text = Field(
        "{{input}}",
        min_length=1,
        title=mark("Prompt template"),
        description=mark("{{input}} is the row's question, {{examples}} the few-shot examples."),
    )
    example: Text = Field("{{input}}\n{{output}}", title=mark("Example template"), description=mark("How one few-shot example is written."))
    separator: Text = Field("\n\n", title=mark("Example separator"), description=mark("Comes after each example."))
    instruction: Text = Field(
        "Think step by step, then give the final answer after ####.", description=mark("The text of {{instruction}}.")
    )
    variables: dict[str, Text] = Field(default_factory=dict, max_length=50)
    shots: int = Field(
        0,
        ge=0,
        le=32,
        title=mark("Number of examples"),
        description=mark("Few-shot examples before the question, taken from the training set only."),
    )
    choose: Literal["chosen", "random", "balanced", "similar"] = Field(
        "random",
        title=mark("Example selection"),
        description=mark("Fixed rows, a random draw, balanced over the answers, or the nearest neighbors of the question."),
        json_schema_extra={"words": {"chosen": mark("fixed rows"), "balanced": mark("balanced"), "similar": mark("nearest neighbors")}},
    )
    lines: list[int] = Field(
        default_factory=list, max_length=32, title=mark("Row numbers"), description=mark("Lines of the dataset, for fixed rows.")
    )
    extract: Rule = Field(
        "all",
        title=mark("Answer parser"),
        description=mark("Which part of the output is the answer."),
        json_schema_extra={"words": {**_RULES}},
    )
    reference: Rule = Field(
        "all",
        title=mark("Reference parser"),
        description=mark("Which part of the row's own answer is the reference."),
        json_schema_extra={"words": {**_RULES}},
    )
    marker: str = Field("####", min_length=1, max_length=64, description=mark("The final answer comes after it, where a parser uses it."))
    score: Score = Field(
        "exact",
        title=mark("Metric"),
        description=mark("How the parsed answer is compared with the reference."),
        json_schema_extra={"words": {**SCORES}},
    )
    grader: str = Field("", max_length=60, description=mark("Id of a saved grader, where that is the metric."))
    samples: int = Field(1, ge=1, le=16, description=mark("Answers per question; the most frequent one counts (self-consistency)."))
    temperature: float = Field(0.0, ge=0, le=2, description=mark("0 = deterministic. Several samples need more than 0."))
    max_tokens: int = Field(64, ge=1, le=4096, description=mark("Longest answer."), json_schema_extra={"unit": "tokens"})
    stop: Text = Field(
        "", title=mark("Stop sequences"), description=mark("Generation stops before any of these; one per line, \\n for a line break.")
    )
    seed: int = Field(42, ge=0, le=2**31 - 1, title=mark("Random seed"), description=mark("Decides the examples drawn and the samples."))

    @model_validator(mode="after")
    def _fits(self) -> PromptBody:
        known = set(OF_ROW) | set(self.variables)
        for name, text, allowed in (("template", self.template, known), ("example", self.example, set(OF_EXAMPLE) | set(self.variables))):
            unknown = sorted(set(VARIABLE.findall(text)) - allowed)
            if unknown:
                raise ValueError(f"the {name} names the variable {unknown[0]}, which nothing fills; there is {', '.join(sorted(allowed))}")
        if "input" not in VARIABLE.findall(self.template):
            raise ValueError("the template must name {{input}}, or every row would be asked the same")
        if self.builder == "few_shot" and (self.shots or len(self.lines)) == 0:
            raise ValueError("a few-shot prompt needs at least one example")
        if self.samples > 1 and self.temperature == 0:
            raise ValueError("several samples at temperature 0 would all be the same; raise the temperature")
        if (self.score == "grader") != bool(self.grader):
            raise ValueError("the metric “saved grader” and a grader belong together; choose both or neither")
        if self.choose == "chosen" and self.shots and not self.lines:
            raise ValueError("fixed examples need their row numbers")
        return self

    def stops(self) -> tuple[str, ...]:
        return tuple(line.replace("\\n", "\n")[:256] for line in self.stop.split("\n") if line)[:16]


STARTS: dict[str, JSON] = {
    "zero_shot": {"builder": "zero_shot", "template": "{{input}}"},
    "few_shot": {
        "builder": "few_shot", "template": "{{examples}}Question: {{input}}\nAnswer:", "example": "Question: {{input}}\nAnswer: {{answer}}",
        "shots": 4, "choose": "similar", "extract": "first_line", "stop": "\\nQuestion:",
    },
    "chain_of_thought": {
        "builder": "chain_of_thought",
        "template": "Question: A farmer has 4 pens with 6 cows in each, and buys 5 more cows. How many cows does he have?\n"
        "Reasoning: 4 pens with 6 cows are 4 × 6 = 24 cows. With 5 more there are 24 + 5 = 29.\n#### 29\n\n"
        "Question: {{input}}\nReasoning:",
        "extract": "after", "reference": "after", "score": "numeric", "max_tokens": 256, "stop": "\\nQuestion:",
    },
}  # fmt: skip
"""Initial values of the form for each strategy."""


class Solved(NamedTuple):
    """A row as a question, its whole answer, and its line."""

    line: int
    question: str
    answer: str


def solved(line: int, row: Mapping[str, Any]) -> tuple[Solved, list[dict[str, Any]]]:
    """A normalised row as a question and its answer, and the turns of the conversation before the question."""
    question, answer, before = formats.of(dict(row)).solved(dict(row))
    return Solved(line, question, answer), [_bare(m) for m in before]


def _words(message: Mapping[str, Any]) -> str:
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def _bare(message: Mapping[str, Any]) -> dict[str, Any]:
    return {"role": message["role"], "content": _words(message)}


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with its variables substituted, in one pass; a name without a value stays as it is written."""
    return VARIABLE.sub(lambda found: values.get(found[1], found[0]), template)


def text_of(body: PromptBody, question: str, examples: Sequence[tuple[str, str]], labels: Sequence[str] = ()) -> str:
    """The prompt for one row. `examples` are (input, output) pairs, in the order they are shown."""
    shared = {**body.variables, "instruction": body.instruction, "labels": ", ".join(labels)}
    shown = "".join(
        fill(body.example, {**shared, "input": one, "output": whole, "answer": take(whole, body.reference, body.marker)}) + body.separator
        for one, whole in examples
    )
    prompt = fill(body.template, {**shared, "input": question, "examples": shown})
    return prompt if not shown or "examples" in VARIABLE.findall(body.template) else shown + prompt


# Reading answers -----------------------------------------------------------------------------------------------------


def take(text: str, rule: Rule, marker: str) -> str:
    """The part of a text that is the answer. Where the marker is missing, `after` takes the last non-empty line."""
    lines = [line.strip() for line in text.strip().splitlines() if line.strip()]
    if rule == "all" or not lines:
        return text.strip()
    if rule == "first_line":
        return lines[0]
    if rule == "last_number":
        found = NUMBER.findall(text)
        return found[-1] if found else ""
    if rule == "after" and marker in text:
        rest = text.rsplit(marker, 1)[1].strip()
        return rest.splitlines()[0].strip() if rest else ""
    return lines[-1]


def majority(answers: Sequence[str], score: Score) -> str:
    """The most frequent answer of several samples (self-consistency, Wang et al. 2023, https://arxiv.org/abs/2203.11171); the
    first of equally frequent ones."""

    def key(answer: str) -> Any:
        number = number_in(answer) if score == "numeric" else None
        return number if number is not None else plain(answer)

    said = [a for a in answers if a.strip()] or list(answers)
    best = Counter(map(key, said)).most_common(1)[0][0]
    return next(a for a in said if key(a) == best)


def right(answer: str, expected: str, score: Score, labels: Sequence[str] = ()) -> float:
    """1 or 0 by every rule except `rouge_l` and `grader`, which are computed where the rows are run."""
    if score == "numeric":
        said, wanted = number_in(answer), number_in(expected)
        return float(said is not None and wanted is not None and math.isclose(said, wanted, rel_tol=1e-6, abs_tol=1e-9))
    if score == "contains":
        return float(bool(plain(expected)) and plain(expected) in plain(answer))
    if score == "label":
        return float(plain(label_in(answer, labels)) == plain(expected))
    return float(plain(answer) == plain(expected))


# Storing -------------------------------------------------------------------------------------------------------------


def read_body(body: Mapping[str, Any]) -> PromptBody:
    """The validated body. Raises BadField that names the field, or says which settings contradict each other."""
    try:
        return PromptBody.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        if first["type"] == "value_error" and not first["loc"]:
            raise BadField(gettext("The prompt does not work: %(error)s.", error=first["ctx"]["error"]), param="template") from None
        raise bad_field(error) from None


def create(session: Session, user: User, name: str, body: PromptBody) -> tuple[Prompt, PromptVersion]:
    name = " ".join(name.split())[:200]
    if not name:
        raise BadField(gettext("The prompt has no name."), hint=gettext("Name it after what it is for."), param="name")
    prompt = Prompt(id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, name=storable(name))
    session.add(prompt)
    session.flush()
    return prompt, _add(session, prompt, 1, body)


def revise(session: Session, user: User, prompt: Prompt, body: PromptBody) -> PromptVersion:
    """The next version; the previous one when nothing changed."""
    session.refresh(prompt, with_for_update=True)
    newest = versions(session, prompt)[-1]
    return newest if PromptBody(**newest.body) == body else _add(session, prompt, newest.number + 1, body)


def _add(session: Session, prompt: Prompt, number: int, body: PromptBody) -> PromptVersion:
    version = PromptVersion(id=uuid.uuid4(), prompt_id=prompt.id, number=number, body=storable(body.model_dump(mode="json")))
    session.add(version)
    session.flush()
    session.refresh(version)
    return version


def mine(user: User) -> Select[Prompt]:
    return ownership.mine(Prompt, user)


def get(session: Session, user: User, prompt_id: uuid.UUID) -> Prompt:
    return owned(session, Prompt, user, prompt_id)


def versions(session: Session, prompt: Prompt) -> list[PromptVersion]:
    return list(session.scalars(select(PromptVersion).where(PromptVersion.prompt_id == prompt.id).order_by(PromptVersion.number)))


def version(session: Session, prompt: Prompt, number: int | None = None) -> PromptVersion:
    """One version, the newest when none is named. Raises NotFound."""
    found = [v for v in versions(session, prompt) if number is None or v.number == number]
    if not found:
        raise NotFound(gettext("The prompt %(name)s has no version %(number)s.", name=prompt.name, number=number), param="version")
    return found[-1]


SHOWN = 100


def newest(session: Session, user: User, limit: int = SHOWN) -> list[tuple[Prompt, list[PromptVersion]]]:
    """The newest prompts, each with its versions, oldest first."""
    found = session.scalars(mine(user).order_by(Prompt.created_at.desc(), Prompt.id).limit(limit)).all()
    of: dict[uuid.UUID, list[PromptVersion]] = {prompt.id: [] for prompt in found}
    for one in session.scalars(select(PromptVersion).where(PromptVersion.prompt_id.in_(of)).order_by(PromptVersion.number)):
        of[one.prompt_id].append(one)
    return [(prompt, of[prompt.id]) for prompt in found]


def delete(session: Session, user: User, prompt: Prompt) -> None:
    prompt.deleted_at = func.clock_timestamp()
    session.flush()


def to_json(session: Session, prompt: Prompt) -> JSON:
    all_ = versions(session, prompt)
    return {
        "id": ids.public(ids.PROMPT, prompt.id),
        "object": "prompt",
        "name": prompt.name,
        "version": all_[-1].number,
        "body": all_[-1].body,
        "versions": [{"version": v.number, "body": v.body, "created_at": int(v.created_at.timestamp())} for v in all_],
        "created_at": int(prompt.created_at.timestamp()),
    }
