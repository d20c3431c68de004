"""Chat templates by name, for models that have none and for people who want another, and validation of custom ones. No torch.

A model that has no tokens for the tags that open a turn reads them as text, and learns them. What ends an answer must be a single
token, or nothing would make the model stop: where the tokenizer lacks the template's own, the end-of-text token is used.
"""

from __future__ import annotations

import re
from collections.abc import Container
from typing import Any, Literal

from app.languages import mark

TemplateName = Literal["model", "chatml", "hermes", "llama3", "gemma", "alpaca", "plain", "jinja"]
SAMPLES = {
    "model": mark("the model's own; plain where it has none"),
    "chatml": "chatml: <|im_start|>user ↵ Hello<|im_end|>",
    "hermes": mark("hermes: chatml with tools and <tool_call>{…}</tool_call>"),
    "llama3": "llama3: <|start_header_id|>user<|end_header_id|> ↵↵ Hello<|eot_id|>",
    "gemma": "gemma: <start_of_turn>user ↵ Hello<end_of_turn>",
    "alpaca": "alpaca: ### Instruction: ↵ Hello ↵↵ ### Response:",
    "plain": "plain: ### User: ↵ Hello ↵↵ ### Assistant:",
    "jinja": mark("jinja: written below"),
}
"""Each template's label, and an example of a user's turn."""
MAX_CHARACTERS = 8000
"""Maximum length of a custom template; those of models have 300 to 5,000. A form sends it in its URL."""

PLAIN = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Assistant:\\n' }}{% endif %}"
)
"""The template of a generic model that is trained on conversations or instructions. It is saved with the result. `source` puts the
begin-of-text token before it where the tokenizer puts one before every text: Gemma was trained on no text without it."""

_CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + END + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_HERMES = (
    "{% set told = messages[0]['role'] == 'system' %}"
    "{% if told or tools %}"
    "{{ '<|im_start|>system\\n' + (messages[0]['content'] if told else '') }}"
    "{% if tools %}{{ '\\n\\n' if told else '' }}{{ 'You may call these functions:\\n<tools>\\n' }}"
    "{% for tool in tools %}{{ (tool['function'] if 'function' in tool else tool) | tojson + '\\n' }}{% endfor %}"
    '{{ \'</tools>\\nA call is written as\\n<tool_call>\\n{"name": …, "arguments": {…}}\\n</tool_call>\' }}{% endif %}'
    "{{ END + '\\n' }}{% endif %}"
    "{% for message in (messages[1:] if told else messages) %}"
    "{% if message['role'] == 'tool' %}"
    "{{ '<|im_start|>user\\n<tool_response>\\n' + message['content'] + '\\n</tool_response>' + END + '\\n' }}"
    "{% else %}{{ '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') }}"
    "{% for call in message['tool_calls'] or [] %}"
    "{% set made = call['function'] if 'function' in call else call %}"
    "{{ '' if loop.first and not message['content'] else '\\n' }}"
    "{{ '<tool_call>\\n{\"name\": ' + made['name'] | tojson + ', \"arguments\": ' }}"
    "{{ made['arguments'] if made['arguments'] is string else made['arguments'] | tojson }}{{ '}\\n</tool_call>' }}"
    "{% endfor %}{{ END + '\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""The form of Hermes' and Qwen's calls, for models whose own template knows no tools."""
_LLAMA3 = (
    "{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + END }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
_SYSTEM_FIRST = (  # it has no turn of its own and is put before the first one's text
    "{% set system = messages[0]['content'] | trim + '\\n\\n' if messages[0]['role'] == 'system' else '' %}"
    "{% for message in messages if message['role'] != 'system' %}"
)
_GEMMA = (
    f"{_SYSTEM_FIRST}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' }}"
    "{{ (system if loop.first else '') + message['content'] | trim + END + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)
_ALPACA = (
    f"{_SYSTEM_FIRST}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] | trim + END + '\\n\\n' }}"
    "{% else %}{{ (system if loop.first else '') + '### Instruction:\\n' + message['content'] | trim + '\\n\\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
_NAMED = {
    "chatml": (_CHATML, "<|im_end|>"),
    "hermes": (_HERMES, "<|im_end|>"),
    "llama3": (_LLAMA3, "<|eot_id|>"),
    "gemma": (_GEMMA, "<end_of_turn>"),
    "alpaca": (_ALPACA, ""),
    "plain": (PLAIN, ""),
}


def source(name: TemplateName, written: str | None, tokens: Container[str], begins: bool) -> str | None:
    """The Jinja source of a choice for a tokenizer with these special `tokens`; `begins` says that the tokenizer puts one before
    every text. None for the model's own."""
    if name == "model":
        return None
    if name == "jinja":
        return written
    text, end = _NAMED[name]
    return ("{{ bos_token }}" if begins else "") + text.replace("END", f"'{end}'" if end in tokens else "eos_token")


_GENERATION = re.compile(r"\{%[-+]?[ ]{0,9}(end)?generation[ ]{0,9}[-+]?%\}")


def fault(template: str) -> str | None:
    """Why a text is no valid chat template, as far as that can be determined without rendering it, which may take any time; None
    where it may be one."""
    from jinja2 import Environment, TemplateSyntaxError, nodes
    from jinja2.ext import loopcontrols

    try:
        parsed: Any = Environment(autoescape=True, extensions=[loopcontrols]).parse(_GENERATION.sub("", template))
        if not any(name.name == "messages" for name in parsed.find_all(nodes.Name)):
            return "It never reads messages, so it writes no conversation"
    except TemplateSyntaxError as error:
        return f"Line {error.lineno}: {(error.message or 'it is no Jinja').rstrip('.')}"
    except RecursionError:
        return "It is nested too deeply"
    return None
