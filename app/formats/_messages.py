"""Validation of conversations, shared by every format with messages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from app.formats._base import Row, RowFinding, Severity, fix, parsed, shown

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "assistant": "assistant",
    "system": "system",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
    "function_call": "assistant",
}
"""ShareGPT's names of speakers that map unambiguously to a role."""
OTHER_NAMES = {
    name: role
    for role, names in {
        "user": "human customer client consumer prompter visitor guest caller requester end_user enduser kunde kundin nutzer benutzer cliente "
        "usuario utilisateur",
        "assistant": "gpt chatgpt claude bot chatbot ai llm model agent operator support advisor adviser representative consultant assistent "
        "berater beraterin mitarbeiter mitarbeiterin asistente support_agent service_agent customer_service customer_support",
        "system": "sys system_prompt",
        "tool": "observation function_response tool_response tool_result tool_output",
    }.items()
    for name in names.split()
}
"""Other exports' names of roles: offered as a fix, never applied silently."""
CHOICES = ("user", "assistant", "system", "tool")
"""Roles that a person may assign to messages of another name."""
KEYS = {"role", "content", "weight", "name", "tool_calls", "tool_call_id", "function_call", "refusal"}
DROP = fix("Remove row", "drop_row")


def as_messages(value: Any, role: str = "user") -> list[Any]:
    """Messages with `role` and `content`, from either form, from a single message, or from a text, which gets `role`. Other
    values are kept, so that validation can report them. Raises TypeError for what is neither text nor messages."""
    turns = parsed(value)
    turns = [turns] if is_turn(turns) else turns
    if isinstance(value, str) and not (isinstance(turns, list) and turns and all(map(is_turn, turns))):
        return [{"role": role, "content": value}] if value else []  # an answer that is JSON is still a text
    if turns is None:
        return []
    if not isinstance(turns, list):
        raise TypeError("neither text nor messages")
    return [message for turn in turns for message in _spelled(turn)]


def is_turn(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or is_sharegpt(value))


def is_sharegpt(turn: Any) -> bool:
    """Whether a turn has the keys {from, value} or {human, assistant}."""
    return isinstance(turn, dict) and "role" not in turn and ("from" in turn or ("human" in turn and "content" not in turn))


def _spelled(turn: Any) -> list[Any]:
    """One turn as messages. An unknown speaker keeps its name, so that validation can report it."""
    if not isinstance(turn, dict):
        return [turn]
    if "role" not in turn and "from" not in turn and is_sharegpt(turn):
        return [{"role": "user", "content": turn["human"]}, {"role": "assistant", "content": turn.get("assistant")}]
    if is_sharegpt(turn):
        speaker = turn["from"]
        role = SPEAKERS.get(speaker.strip().lower(), speaker) if isinstance(speaker, str) else speaker
        kept = {key: item for key, item in turn.items() if key in KEYS and key != "content"}
        return [{"role": role, "content": turn.get("value", turn.get("content")), **kept}]
    speaker = turn.get("role")
    return [{**turn, "role": SPEAKERS[speaker]}] if isinstance(speaker, str) and speaker in SPEAKERS else [turn]


def check_messages(value: Any, column: str, *, answer: bool = True) -> list[RowFinding]:
    """Findings about one conversation. `answer` requires an assistant's answer at its end."""
    messages = parsed(value)
    if not isinstance(messages, list):
        return [RowFinding("wrong_shape", f"“{column}” must be a list of messages.", column, shown(value), "error", DROP)]
    if not messages:
        return [RowFinding("wrong_shape", f"“{column}” holds no message.", column, "[]", "error", DROP)]
    messages = as_messages(messages)
    findings: list[RowFinding] = []
    for index, message in enumerate(messages):
        findings += _check_message(message, f"{column}[{index}]")
    if any(finding.severity == "error" for finding in findings):
        return findings  # the order of invalid messages is meaningless
    return findings + _check_order(messages, column, answer)


def _check_message(message: Any, at: str) -> list[RowFinding]:
    if not isinstance(message, dict):
        return [RowFinding("wrong_shape", "A message must be an object with “role” and “content”.", at, shown(message), "error", DROP)]
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        return [_wrong_role(role, at)]
    findings = _check_content(message, role, at)
    weight = message.get("weight")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        findings.append(
            RowFinding(
                "wrong_weight",
                "“weight” must be 0 or 1.",
                f"{at}.weight",
                shown(weight),
                "error",
                fix("Remove the weight", "set", value=None),
            )
        )
    elif weight is not None and role != "assistant":
        findings.append(
            RowFinding(
                "wrong_weight", "Only an assistant's message has a weight; this one is ignored.", f"{at}.weight", shown(weight), "warning"
            )
        )
    unknown = [key for key in message if key not in KEYS]
    if unknown:
        named = ", ".join(f"“{key}”" for key in unknown[:5])
        findings.append(RowFinding("unknown_key", f"The keys {named} of a message have no meaning here and are ignored.", at, None, "note"))
    return findings


def named(speaker: Any) -> str | None:
    """A normalized role name, in lower case and stripped: “Agent ” and “agent” are one. None for a value that is no name."""
    return (speaker.strip().lower() or None) if isinstance(speaker, str) else None


def known_role(name: str) -> str | None:
    """The role that another name stands for; None where it is ambiguous."""
    if name in ROLES:
        return {"developer": "system", "function": "tool"}.get(name, name)
    return SPEAKERS.get(name) or OTHER_NAMES.get(name.replace(" ", "_").replace("-", "_"))


def recast(row: Row, columns: Iterable[str], roles: Mapping[str, str]) -> Row:
    """The row with the messages of some speakers assigned to other roles; the row itself where none of them occurs in it."""
    changed = {column: turns for column in columns if (turns := _recast(row.get(column), roles)) is not row.get(column)}
    return row | changed if changed else row


def _recast(value: Any, roles: Mapping[str, str]) -> Any:
    inner = parsed(value)
    if isinstance(inner, dict) and "messages" in inner:  # OpenAI's input of a preference
        turns = _recast(inner["messages"], roles)
        return value if turns is inner["messages"] else {**inner, "messages": turns}
    turns = inner if isinstance(inner, list) else [inner]
    if not any(_speaker(turn) in roles for turn in turns):
        return value
    cast = [
        {**turn, "role" if "role" in turn else "from": roles[name]} if (name := _speaker(turn)) is not None and name in roles else turn
        for turn in turns
    ]
    return cast if isinstance(inner, list) else cast[0]


def _speaker(turn: Any) -> str | None:
    return named(turn.get("role", turn.get("from"))) if isinstance(turn, dict) else None


def _wrong_role(role: Any, at: str) -> RowFinding:
    """An unknown name has no fix of its own: a person decides once, for all rows, which role it means."""
    name = named(role)
    better = known_role(name) if name else None
    if name is None:
        what = "has no role" if role is None else f"has {shown(role, 40)} for a role"
        return RowFinding("wrong_role", f"This message {what}. It must be one of {', '.join(ROLES[:5])}.", f"{at}.role", None)
    advice = f"Suggested: “{better}”." if better else "Choose under “Unknown roles” which role it means."
    repair = fix(f"Change to “{better}”", "role", name=name, role=better) if better else None
    return RowFinding("wrong_role", f"This message has the role “{shown(role, 40)}”. {advice}", f"{at}.role", shown(role), "error", repair)


def _check_content(message: Row, role: str, at: str) -> list[RowFinding]:
    content, calls = message.get("content"), message.get("tool_calls") or message.get("function_call")
    if isinstance(content, list):
        other = [part.get("type", "?") if isinstance(part, dict) else "?" for part in content if not _is_text_part(part)]
        if other:
            kinds = ", ".join(sorted({str(kind) for kind in other}))
            return [
                RowFinding(
                    "not_text",
                    f"Only text parts can be trained on here, and this message has: {kinds}.",
                    f"{at}.content",
                    None,
                    "error",
                    DROP,
                )
            ]
    elif content is not None and not isinstance(content, str):
        return [RowFinding("wrong_shape", "“content” must be text.", f"{at}.content", shown(content), "error", DROP)]
    if not flat(content).strip() and not calls:
        if role == "assistant":
            if message.get("weight") == 0:
                return []
            return [
                RowFinding("empty_answer", "The answer is empty, so the row has no trainable tokens.", f"{at}.content", "", "error", DROP)
            ]
        severity: Severity = "warning" if role in ("system", "developer", "tool", "function") else "error"
        return [RowFinding("empty", f"The {role}'s message is empty.", f"{at}.content", "", severity, DROP)]
    if calls is not None and role != "assistant":
        return [RowFinding("wrong_role_order", "Only the assistant calls tools.", f"{at}.tool_calls", shown(calls), "error", DROP)]
    return _check_calls(message.get("tool_calls"), at)


def _check_calls(calls: Any, at: str) -> list[RowFinding]:
    if calls is None:
        return []
    good = isinstance(calls, list) and all(
        isinstance(call, dict) and isinstance(call.get("function"), dict) and isinstance(call["function"].get("name"), str)
        for call in calls
    )
    if good:
        return []
    message = "“tool_calls” must be a list of {id, type, function: {name, arguments}}."
    return [RowFinding("wrong_shape", message, f"{at}.tool_calls", shown(calls), "error", DROP)]


def _is_text_part(part: Any) -> bool:
    return isinstance(part, dict) and part.get("type", "text") == "text" and isinstance(part.get("text"), str)


def _check_order(messages: Sequence[Row], column: str, answer: bool) -> list[RowFinding]:
    findings: list[RowFinding] = []
    previous, speaker, open_calls = "", None, set[str]()
    for index, message in enumerate(messages):
        role, at = message["role"], f"{column}[{index}]"
        if role in ("system", "developer"):
            if previous and previous not in ("system", "developer"):
                text = "The system's message must stand first; many chat templates refuse it later."
                findings.append(RowFinding("wrong_role_order", text, at, role, "error", fix("Move it to the front", "system_first")))
                return findings
        elif role in ("tool", "function"):
            if previous not in ("tool", "function") and not open_calls and previous != "assistant":
                text = "A tool's answer must follow the assistant's call."
                return [*findings, RowFinding("wrong_role_order", text, at, role, "error", DROP)]
            call = message.get("tool_call_id")
            if open_calls and isinstance(call, str) and call not in open_calls:
                text = f"No call before this answer has the id “{shown(call, 40)}”."
                findings.append(RowFinding("wrong_role_order", text, f"{at}.tool_call_id", shown(call), "warning"))
        elif role == previous and not (role == "user" and speaker and message.get("name") not in (None, speaker)):
            text = f"Two messages of the {role} follow each other."
            findings.append(RowFinding("wrong_role_order", text, at, role, "error", fix("Join the two", "join_messages", index=index)))
            return findings
        elif role == "assistant" and previous in ("", "system", "developer") and answer:
            text = "The assistant speaks before the user has said anything."
            findings.append(
                RowFinding("wrong_role_order", text, at, role, "warning", fix("Drop this message", "drop_message", index=index))
            )
        if role == "assistant":
            open_calls = {call["id"] for call in message.get("tool_calls") or [] if isinstance(call.get("id"), str)}
        previous, speaker = role, message.get("name")
    return findings + (_check_answer(messages, column) if answer else [])


def _check_answer(messages: Sequence[Row], column: str) -> list[RowFinding]:
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        return [
            RowFinding("no_answer", "No message is from the assistant, so the row has no trainable tokens.", column, None, "error", DROP)
        ]
    if all(message.get("weight") == 0 for message in answers):
        return [
            RowFinding("nothing_to_learn", "Every answer has weight 0, so the row has no trainable tokens.", column, None, "error", DROP)
        ]
    last = len(messages) - 1
    if messages[last]["role"] != "assistant":
        text = "The conversation must end with the assistant's answer."
        repair = fix("Drop the last message", "drop_message", index=last)
        return [RowFinding("wrong_role_order", text, f"{column}[{last}]", messages[last]["role"], "error", repair)]
    return []


def flat(content: Any) -> str:
    """The text of a message's content, which may also be a list of text parts, as in OpenAI's API."""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        return "".join(part["text"] for part in content if _is_text_part(part))
    return ""


def normalise_messages(value: Any) -> list[Row]:
    """Messages with the keys a chat template knows, in a fixed order. `developer` becomes system; `function` becomes tool."""
    result: list[Row] = []
    parts: list[str] = []  # contents of consecutive system messages, which are merged
    for message in as_messages(value):
        role = {"developer": "system", "function": "tool"}.get(message["role"], message["role"])
        clean: Row = {"role": role, "content": flat(message.get("content"))}
        if role == "assistant" and message.get("weight") is not None:
            clean["weight"] = int(message["weight"])
        if message.get("name"):
            clean["name"] = message["name"]
        if message.get("tool_calls"):
            clean["tool_calls"] = message["tool_calls"]
        elif message.get("function_call"):
            clean["tool_calls"] = [{"id": "call_0", "type": "function", "function": message["function_call"]}]
        if message.get("tool_call_id"):
            clean["tool_call_id"] = message["tool_call_id"]
        if parts and role != "system":
            result[-1]["content"], parts = "\n\n".join(parts), []
        if role != "system" or not parts:
            result.append(clean)
        if role == "system":
            parts.append(clean["content"])
    if parts:
        result[-1]["content"] = "\n\n".join(parts)
    return result
