"""Conversations are written, character for character, as transformers' `apply_chat_template` writes them."""

from __future__ import annotations

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from app.chat_templates import PLAIN
from tests.tiny import CHAT_TEMPLATE, build_tokenizer
from worker.data import template_pool
from worker.data.template_child import TemplateWriter

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
# The well-known forms, in words of our own.
TEMPLATES = {
    "plain": PLAIN,
    "chatml": CHAT_TEMPLATE,
    "smollm": (
        "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe of help.<|im_end|>\n' }}"
        "{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    ),
    "llama 3": (
        "{{- bos_token }}\n{%- if messages[0]['role'] == 'system' %}\n    {%- set system = messages[0]['content'] | trim %}\n"
        "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system = '' %}\n{%- endif %}\n"
        "{%- if not date_string is defined %}{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}\n"
        "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + date_string + '\n\n' }}\n"
        "{%- if tools is not none %}\n    {%- for t in tools %}\n        {{- t | tojson(indent=4) }}\n        {{- '\n\n' }}\n    {%- endfor %}\n{%- endif %}\n"
        "{{- system + '<|eot_id|>' }}\n{%- for message in messages %}\n"
        "    {%- if 'tool_calls' in message %}\n        {%- if not message.tool_calls | length == 1 %}{{- raise_exception('one call at a time') }}{%- endif %}\n"
        "        {%- set call = message.tool_calls[0].function %}\n"
        "        {{- '<|start_header_id|>assistant<|end_header_id|>\n\n{\"name\": \"' + call.name + '\", \"parameters\": ' + call.arguments | tojson + '}<|eot_id|>' }}\n"
        "    {%- elif message.role == 'tool' %}\n        {{- '<|start_header_id|>ipython<|end_header_id|>\n\n' }}\n"
        "        {%- if message.content is mapping or message.content is iterable and message.content is not string %}{{- message.content | tojson }}"
        "{%- else %}{{- message.content }}{%- endif %}{{- '<|eot_id|>' }}\n"
        "    {%- else %}\n        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}\n"
        "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}\n"
    ),
    "qwen 3": (
        "{%- if tools %}\n    {{- '<|im_start|>system\n' }}\n    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\n\n' }}{%- endif %}\n"
        "    {{- '# Tools\n<tools>' }}\n    {%- for tool in tools %}\n        {{- '\n' }}\n        {{- tool | tojson }}\n    {%- endfor %}\n"
        "    {{- '\n</tools><|im_end|>\n' }}\n{%- elif messages[0].role == 'system' %}\n"
        "    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}\n{%- endif %}\n"
        "{%- set ns = namespace(multi_step_tool=true, last=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
        "    {%- set index = (messages|length - 1) - loop.index0 %}\n"
        "    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not(message.content.startswith('<tool_response>')) %}\n"
        "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last = index %}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- for message in messages %}\n    {%- set content = message.content if message.content is string else '' %}\n"
        "    {%- if message.role == 'user' or (message.role == 'system' and not loop.first) %}\n"
        "        {{- '<|im_start|>' + message.role + '\n' + content + '<|im_end|>' + '\n' }}\n    {%- elif message.role == 'assistant' %}\n"
        "        {%- set reasoning = '' %}\n        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}\n"
        "        {%- elif '</think>' in content %}\n            {%- set reasoning = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}\n"
        "            {%- set content = content.split('</think>')[-1].lstrip('\n') %}\n        {%- endif %}\n"
        "        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}\n"
        "            {{- '<|im_start|>' + message.role + '\n<think>\n' + reasoning.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}\n"
        "        {%- else %}\n            {{- '<|im_start|>' + message.role + '\n' + content }}\n        {%- endif %}\n"
        "        {%- for call in message.tool_calls or [] %}\n            {%- if call.function %}{%- set call = call.function %}{%- endif %}\n"
        '            {{- \'\n<tool_call>\n{"name": "\' + call.name + \'", "arguments": \' }}\n'
        "            {%- if call.arguments is string %}{{- call.arguments }}{%- else %}{{- call.arguments | tojson }}{%- endif %}\n"
        "            {{- '}\n</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>\n' }}\n    {%- elif message.role == 'tool' %}\n"
        "        {{- '<|im_start|>user\n<tool_response>\n' + content + '\n</tool_response><|im_end|>\n' }}\n    {%- endif %}\n{%- endfor %}\n"
        "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\n' }}\n"
        "    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}\n{%- endif %}"
    ),
    "mistral": (
        "{{ bos_token }}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
        "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
        "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
    ),
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for message in messages %}{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
        "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
    ),
    "zephyr": (
        "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n"
        "{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'assistant' %}\n"
        "{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n"
        "{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}"
    ),
    "odd": (
        "{% set d = dict(a=1, **{'b': 2}) %}{% for m in messages %}{% if loop.index > 4 %}{% break %}{% endif %}{{ d.items() | list }}"
        "{{ m.thinking }}|{{ m.get('reasoning_content', '-') }}|{{ m.content | upper | replace('A', 'b') | indent(2) }}{{ m | tojson(sort_keys=true) }}"
        "{{ '%s-%03d' % (m.role, loop.index) }}{{ '{0:>9}'.format(m.role) }}{{ undefined_name }}{% if m.role == 'tool' %}{% continue %}{% endif %}"
        "{{ m.content.split() | map('length') | sum }}{% macro f(x) %}[{{ x }}]{% endmacro %}{{ f(m.role) }}{% endfor %}"
    ),
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weigh",
            "description": "Weighs — 称 & <b>",
            "parameters": {"type": "object", "properties": {"of": {"type": "string"}}},
        },
    }
]
ASKED, SAID = {"role": "user", "content": " What wood <is> it? 云杉 🎻 "}, {"role": "assistant", "content": "Spruce & 'maple'.\n"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "weigh", "arguments": {"of": "É", "n": 1.5}}}],
}
TALKS = [
    [ASKED],
    [ASKED, SAID, ASKED],
    [{"role": "system", "content": "Be short. "}, ASKED, SAID],
    [ASKED, {**SAID, "content": "<think>\nhm\n</think>\n\nSpruce."}, ASKED, {**SAID, "reasoning": "Let me see."}],
    [ASKED, CALL, {"role": "tool", "content": '{"grams": 68}'}, {**SAID, "tool_calls": None}],
    [{"role": "user", "content": "lone \ud800 and \x00 and \u2028"}],
    [SAID, SAID],
]


def outcome(render) -> str:
    try:
        return render()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_text_is_that_of_transformers(name: str) -> None:
    writer = TemplateWriter(TEMPLATES[name], SPECIAL, [])
    written = 0
    for talk in TALKS:
        for tools in (None, TOOLS):
            for generate in (False, True):
                kept = [{key: value for key, value in message.items() if value is not None} for message in talk]
                given = {"conversations": [kept], "tools": tools, "chat_template": TEMPLATES[name], "add_generation_prompt": generate}
                wanted = outcome(lambda given=given: render_jinja_template(**given, **SPECIAL)[0][0])
                assert outcome(lambda talk=talk, tools=tools, generate=generate: writer.text(talk, tools, generate)) == wanted
                written += not wanted.startswith("TemplateError")
    assert written >= 8


def test_it_is_also_the_text_that_comes_out_of_the_process_and_has_the_same_tokens() -> None:
    tokenizer = build_tokenizer()
    for template in (TEMPLATES["chatml"], TEMPLATES["qwen 3"], TEMPLATES["zephyr"]):
        for talk in TALKS[:5]:
            text = template_pool.write(tokenizer, template, template_pool.TemplateInput(talk, TOOLS, generate=True)).text
            ids = tokenizer.apply_chat_template(talk, TOOLS, chat_template=template, add_generation_prompt=True, return_dict=False)
            assert tokenizer(text, add_special_tokens=False)["input_ids"] == ids
