"""The chat template of a model in Go, for Ollama.

Ollama reads no Jinja. A template is not translated: it is rendered on sample conversations and compared with the families known here,
each of which is written in both languages. One that is none of them is refused, since a template that is nearly right is the
commonest reason why a model answers well in one program and badly in another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from app import chat_templates
from app.errors import Unsupported

_CHATML = """{{- range .Messages }}<|im_start|>{{ .Role }}
{{ .Content }}END
{{ end }}<|im_start|>assistant
"""
_LLAMA3 = """{{- range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>

{{ .Content }}END
{{- end }}<|start_header_id|>assistant<|end_header_id|>

"""
_GEMMA = """{{- range $i, $_ := .Messages }}
{{- if ne .Role "system" }}<start_of_turn>{{ if eq .Role "assistant" }}model{{ else }}{{ .Role }}{{ end }}
{{ if and $.System (eq $i 1) }}{{ $.System }}

{{ end }}{{ .Content }}END
{{ end }}
{{- end }}<start_of_turn>model
"""
_PLAIN = """{{- range .Messages }}### {{ if eq .Role "user" }}User{{ else if eq .Role "assistant" }}Assistant{{ else }}System{{ end }}:
{{ .Content }}{{ if eq .Role "assistant" }}END{{ end }}

{{ end }}### Assistant:
"""
FAMILIES = {
    "chatml": (_CHATML, "<|im_end|>", ("<|im_start|>",)),
    "llama3": (_LLAMA3, "<|eot_id|>", ("<|start_header_id|>",)),
    "gemma": (_GEMMA, "<end_of_turn>", ("<start_of_turn>",)),
    "plain": (_PLAIN, "", ("### User:",)),
}
"""A family of `app.chat_templates` → (its template in Go, the token that ends a turn, what begins one)."""

ONE = [{"role": "user", "content": "How long does varnish dry?"}]
LATER = [*ONE, {"role": "assistant", "content": "Two days."}, {"role": "user", "content": "And in winter?"}]
SYSTEM = {"role": "system", "content": "Answer in one sentence."}
CONVERSATIONS = (ONE, LATER, [SYSTEM, *ONE], [SYSTEM, *LATER])


class GoTemplate(NamedTuple):
    """The Go template of a model. `system` is what its own template says where nobody says anything."""

    family: str
    template: str
    stops: tuple[str, ...]
    system: str = ""


def find(tokenizer: Any) -> GoTemplate:
    """The family whose every sample is rendered as this model's. Raises Unsupported naming where the nearest one differs."""
    if not tokenizer.chat_template:
        return GoTemplate("", "{{ .Prompt }}", ())
    special = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    differences = []
    for family, (template, end, begins) in FAMILIES.items():
        jinja = str(chat_templates.source(family, None, special, False))  # type: ignore[arg-type]
        written = end if end in special else str(tokenizer.eos_token)
        system, differs = _compare(tokenizer, jinja)
        if differs is None:
            return GoTemplate(family, template.replace("END", written), (written, *begins), system)
        differences.append((differs, family))
    at, nearest = max(differences)
    raise Unsupported(
        f"The model's chat template is none of those known in Ollama's language ({', '.join(FAMILIES)}): "
        f"it differs from {nearest} from character {at} of a sample on.",
        hint="Export as GGUF: llama.cpp reads the template as it is.",
    )


def _compare(tokenizer: Any, jinja: str) -> tuple[str, int | None]:
    """(the system prompt that the model's template adds by itself, None when every sample is the same, else where one first differs)."""
    system = ""
    for messages in CONVERSATIONS:
        ours, theirs = render(tokenizer, messages), render(tokenizer, messages, jinja)
        if ours != theirs and messages[0]["role"] != "system":
            system = system or _own_system(ours, render(tokenizer, [SYSTEM, *messages], jinja))
            theirs = render(tokenizer, [{"role": "system", "content": system}, *messages], jinja) if system else theirs
        if ours != theirs:
            return "", next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return system, None


def _own_system(ours: str, with_system: str) -> str:
    """What is in a prompt where the sample system prompt would be; empty where it does not begin and end alike."""
    before, _, after = with_system.partition(SYSTEM["content"])
    if ours.startswith(before) and ours.endswith(after) and len(ours) > len(before) + len(after):
        return ours[len(before) : len(ours) - len(after)]
    return ""


def render(tokenizer: Any, messages: list[dict[str, str]], jinja: str | None = None) -> str:
    """A prompt without the token that the tokenizer puts before every text, which Ollama does too. Empty where the template refuses it."""
    try:
        text = str(tokenizer.apply_chat_template(messages, chat_template=jinja, tokenize=False, add_generation_prompt=True))
    except Exception:  # whatever a foreign template raises
        return ""
    begins = tokenizer.bos_token_id is not None and tokenizer("a").input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(tokenizer.bos_token) if begins else text
