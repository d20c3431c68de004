"""What the graders that ask a model share: their messages, and how an answer is read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from app.graders._base import JSON, GradedSample, Grader, JudgeAsk
from app.graders._templates import Template, fill
from app.languages import mark

_TEXTS = ("input_text", "output_text", "text")


def _as_text(content: Any) -> Any:
    """A content, one part or a list of parts, as one text; parts that are no text are refused."""
    if isinstance(content, list):
        return "\n".join(_as_text(part) for part in content)
    if isinstance(content, dict):
        if content.get("type") not in _TEXTS or not isinstance(content.get("text"), str):
            raise ValueError(f"a judge here reads text only, not {str(content.get('type'))[:40]}")
        return content["text"]
    return content


class JudgeMessage(BaseModel):
    """One message to the judge."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    role: Literal["user", "assistant", "system", "developer"]
    content: Annotated[Template, BeforeValidator(_as_text, json_schema_input_type=str | JSON | list[str | JSON])]
    type: Literal["message"] = "message"


class Judge(Grader):
    """A grader whose model reads messages."""

    model: str = Field(
        min_length=1, max_length=300, description=mark("The model that judges, one of this studio or of a registered server.")
    )
    input: tuple[JudgeMessage, ...] = Field(min_length=1, max_length=50, description=mark("Messages to the judge, with templates."))

    def models(self) -> Iterator[str | None]:
        yield self.model

    def ask(self, messages: tuple[JSON, ...]) -> JudgeAsk:
        """A question to the model."""
        return JudgeAsk(self.model, messages, max_tokens=64)

    def messages(self, sample: GradedSample, item: JSON, instruction: str) -> tuple[JSON, ...]:
        """The filled messages, the last of which ends with how to answer."""
        found = [
            {"role": "system" if one.role == "developer" else one.role, "content": fill(one.content, sample, item)} for one in self.input
        ]
        if found[-1]["role"] == "user":
            found[-1] = {"role": "user", "content": f"{found[-1]['content']}\n\n{instruction}"}
        else:
            found.append({"role": "user", "content": instruction})
        return tuple(found)


def result_in(text: str) -> Any:
    """The value of `result` in the last JSON object of an answer; None where there is none."""
    begin = text.rfind("{")
    while begin >= 0 and len(text) - begin < 10_000:
        try:
            found, _ = json.JSONDecoder().raw_decode(text, begin)
        except (ValueError, RecursionError):
            found = None
        if isinstance(found, dict) and "result" in found:
            return found["result"]
        begin = text.rfind("{", 0, begin)
    return None
