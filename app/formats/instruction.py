"""Instruction: alpaca's keys and their common synonyms."""

from __future__ import annotations

from typing import ClassVar

from app.formats._base import Columns, Field, Format, Row, RowFinding, check_text, fix, parsed, shown, text_of
from app.formats._conversions import Conversion, as_it_is, prompt_and_completion
from app.formats._prompt import is_history, joined
from app.formats._rows import Messages
from app.languages import mark


class Instruction(Messages, Format):
    name: ClassVar = "instruction"
    title: ClassVar = mark("Instruction")
    shape: ClassVar = "instruction"
    summary: ClassVar = mark("One instruction, perhaps with an input, and the answer to it. The answer is trained on.")
    example: ClassVar = {"instruction": "Name the color.", "input": "grass", "output": "green"}
    fields: ClassVar = (
        Field(
            "instruction",
            mark("What is asked."),
            ("instruction", "question", "query", "user", "human", "task", "request", "problem"),
            holds="question",
        ),
        Field("input", mark("The text the instruction is about."), ("input", "context", "passage"), False),
        Field(
            "output",
            mark("The answer to train on."),
            ("output", "response", "answer", "assistant", "reply", "target", "solution"),
            holds="answer",
        ),
        Field("system", mark("How the assistant should behave."), ("system", "system_prompt"), False),
        Field("history", mark("Earlier turns, as pairs of question and answer."), ("history",), False),
    )
    place: ClassVar = 20
    checked_as: ClassVar = "chat"  # its normalised rows are conversations
    file_columns: ClassVar = {"instruction": "instruction", "output": "output", "input": ""}
    conversions: ClassVar = {
        "chat": Conversion("an instruction is a conversation of one turn, so nothing changes", True, as_it_is),
        "completion": Conversion(
            "the system's and the user's text become the prompt; earlier turns are excluded with their rows", False, prompt_and_completion
        ),
    }

    def tuned_kind(self, kind: str) -> str:
        return "instruction" if kind == "generic" else kind

    def file_row(self, row: Row) -> Row:
        *before, asked, answer = row["messages"]
        system = before.pop(0)["content"] if before and before[0]["role"] == "system" else None
        history = [[one["content"], two["content"]] for one, two in zip(before[::2], before[1::2], strict=True)]
        made = {"instruction": asked["content"], "output": answer["content"], "system": system, "history": history}
        return {key: value for key, value in made.items() if value}

    def check(self, row: Row, mapping: Columns) -> list[RowFinding]:
        findings = check_text(row, mapping.get("instruction"), "instruction")
        findings += check_text(row, mapping.get("output"), "output", rule="empty_answer")
        for name in ("input", "system"):
            if name in mapping:
                findings += check_text(row, mapping[name], name, empty=None)
        history = parsed(row.get(mapping["history"])) if "history" in mapping else None
        if history and not is_history(history):
            text = "“history” must be a list of pairs of question and answer."
            findings.append(RowFinding("wrong_shape", text, mapping["history"], shown(history), "error", fix("Remove row", "drop_row")))
        return findings

    def normalise(self, row: Row, mapping: Columns) -> Row:
        messages: list[Row] = []
        system = text_of(row, mapping.get("system"))
        if system and system.strip():
            messages.append({"role": "system", "content": system})
        for question, answer in (parsed(row.get(mapping["history"])) or []) if "history" in mapping else []:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        ask, about = text_of(row, mapping["instruction"]) or "", text_of(row, mapping.get("input"))
        messages += [
            {"role": "user", "content": joined(ask, about)},
            {"role": "assistant", "content": text_of(row, mapping["output"]) or ""},
        ]
        return {"messages": messages}
