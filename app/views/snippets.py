"""Code that calls a model from outside: the same request in Python, JavaScript and curl."""

from __future__ import annotations

import json

NO_KEY = "sk-luthier-…"
_TEXT = "The first text to look at."


def snippets(kind: str, name: str, base_url: str, key: str = NO_KEY) -> dict[str, str]:
    """By language. `base_url` ends with /v1."""
    path, body, python, javascript = _CALLS[kind if kind in _CALLS else "dialogue"]
    model, sent = json.dumps(name, ensure_ascii=False), json.dumps({"model": name, **body}, ensure_ascii=False)
    shell = sent.replace("'", "'\\''")
    return {
        "python": f'from openai import OpenAI\n\nclient = OpenAI(base_url="{base_url}", api_key="{key}")\n{python.replace("MODEL", model)}',
        "javascript": f'import OpenAI from "openai";\n\nconst client = new OpenAI({{ baseURL: "{base_url}", apiKey: "{key}" }});\n'
        + javascript.replace("MODEL", model),
        "curl": f'curl {base_url}/{path} \\\n  -H "Authorization: Bearer {key}" -H "Content-Type: application/json" \\\n  -d \'{shell}\'',
    }


Call = tuple[str, dict[str, object], str, str]
"""The path, the body, and the call in Python and in JavaScript."""

_CHAT: Call = (
    "chat/completions",
    {"messages": [{"role": "user", "content": "Hello!"}]},
    'answer = client.chat.completions.create(\n    model=MODEL,\n    messages=[{"role": "user", "content": "Hello!"}],\n)\n'
    "print(answer.choices[0].message.content)",
    'const answer = await client.chat.completions.create({\n  model: MODEL,\n  messages: [{ role: "user", content: "Hello!" }],\n});\n'
    "console.log(answer.choices[0].message.content);",
)
_CALLS: dict[str, Call] = {
    "dialogue": _CHAT,
    "instruction": _CHAT,
    "generic": (
        "completions",
        {"prompt": "The cat sat on", "max_tokens": 20},
        'answer = client.completions.create(model=MODEL, prompt="The cat sat on", max_tokens=20)\nprint(answer.choices[0].text)',
        'const answer = await client.completions.create({ model: MODEL, prompt: "The cat sat on", max_tokens: 20 });\n'
        "console.log(answer.choices[0].text);",
    ),
    "classifier": (
        "classify",
        {"input": [_TEXT]},
        f'answer = client.post("/classify", body={{"model": MODEL, "input": ["{_TEXT}"]}}, cast_to=object)\n'
        'print(answer["data"][0]["probabilities"])',
        f'const answer = await client.post("/classify", {{ body: {{ model: MODEL, input: ["{_TEXT}"] }} }});\n'
        "console.log(answer.data[0].probabilities);",
    ),
    "encoder": (
        "embeddings",
        {"input": [_TEXT]},
        f'answer = client.embeddings.create(model=MODEL, input=["{_TEXT}"])\nprint(answer.data[0].embedding[:8])',
        f'const answer = await client.embeddings.create({{ model: MODEL, input: ["{_TEXT}"] }});\nconsole.log(answer.data[0].embedding);',
    ),
}
