"""LiteLLM asks a studio: whole, streamed, with a tool, by a schema, and a completion with log-probabilities."""

import json
import os

import litellm

where = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}
ask = [{"role": "user", "content": "What wood is the belly made of?"}]
whole = litellm.completion(model="openai/agent", messages=ask, max_tokens=12, temperature=0, logprobs=True, top_logprobs=2, **where)
parts = list(
    litellm.completion(
        model="openai/agent", messages=ask, max_tokens=12, temperature=0, stream=True, stream_options={"include_usage": True}, **where
    )
)
function = {
    "name": "both",
    "description": "Whether two things are both so.",
    "parameters": {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"], "additionalProperties": False},
}
called = litellm.completion(
    model="openai/agent",
    messages=ask,
    tools=[{"type": "function", "function": function}],
    max_tokens=400,
    temperature=0,
    tool_choice={"type": "function", "function": {"name": "both"}},
    **where,
)
schema = {"type": "object", "properties": {"sure": {"type": "boolean"}}, "required": ["sure"], "additionalProperties": False}
shaped = litellm.completion(
    model="openai/agent",
    messages=ask,
    max_tokens=400,
    temperature=0,
    response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}},
    **where,
)
text = litellm.text_completion(model="text-completion-openai/agent", prompt="The luthier", max_tokens=4, temperature=0, logprobs=1, **where)
try:
    litellm.completion(model="openai/none", messages=ask, **where)
    refused = None
except litellm.NotFoundError as error:
    refused = str(error)
print(
    json.dumps(
        {
            "whole": whole.choices[0].message.content,
            "finish": whole.choices[0].finish_reason,
            "logprobs": len(whole.choices[0].logprobs.content),
            "streamed": "".join(part.choices[0].delta.content or "" for part in parts if part.choices),
            "usage": [whole.usage.completion_tokens, next(p.usage.completion_tokens for p in reversed(parts) if getattr(p, "usage", None))],
            "call": [(call.function.name, json.loads(call.function.arguments)) for call in called.choices[0].message.tool_calls],
            "called": called.choices[0].finish_reason,
            "shaped": json.loads(shaped.choices[0].message.content),
            "text": text.choices[0].text,
            "refused": refused,
        }
    )
)
