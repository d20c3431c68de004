"""LangChain's chat model asks a studio: whole, streamed, a batch, a tool, an answer in the shape of a class."""

import json
import os

from langchain_core.messages import HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel


@tool
def both(x: bool, y: bool) -> bool:
    """Whether two things are both so."""
    return x and y


class Wood(BaseModel):
    """A wood of a violin."""

    hard: bool


model = ChatOpenAI(
    model="agent",
    base_url=os.environ["OPENAI_BASE_URL"],
    api_key=os.environ["OPENAI_API_KEY"],
    temperature=0,
    max_tokens=400,
    seed=1,
    max_retries=0,
    stream_usage=True,
)
ask = [SystemMessage("Answer in one short sentence."), HumanMessage("What wood is the belly made of?")]
whole = model.invoke(ask, max_tokens=12)
parts = list(model.stream(ask, max_tokens=12))
total = parts[0]
for part in parts[1:]:
    total = total + part
several = model.batch([ask, [HumanMessage("What is carved last?")]], max_tokens=8)
called = model.bind_tools([both], tool_choice="both", parallel_tool_calls=False, strict=True).invoke(ask)
results = [ToolMessage(str(both.invoke(call["args"])), tool_call_id=call["id"]) for call in called.tool_calls]
answered = model.bind_tools([both]).invoke([*ask, called, *results], max_tokens=12)
shaped = {how: model.with_structured_output(Wood, method=how, strict=True).invoke(ask).hard for how in ("json_schema", "function_calling")}
print(
    json.dumps(
        {
            "whole": whole.content,
            "finish": whole.response_metadata["finish_reason"],
            "usage": whole.usage_metadata["output_tokens"],
            "streamed": total.content,
            "streamed_usage": total.usage_metadata["output_tokens"],
            "several": [one.content for one in several],
            "called": {"finish": called.response_metadata["finish_reason"], "unread": called.invalid_tool_calls},
            "calls": [(call["name"], call["args"]) for call in called.tool_calls],
            "results": [one.content for one in results],
            "answered": answered.type,
            "shaped": shaped,
        }
    )
)
