"""Secrets and personal data: keys, tokens, e-mail addresses, phone and card numbers. A model learns to repeat them."""

from __future__ import annotations

import re

from app.formats import Finding
from app.formats._base import fix
from app.rules._base import Rule, Seen

SECRETS = {
    "a private key": r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY-----",
    "an API key": r"\b(?:sk-(?:[a-z]+-)?[A-Za-z0-9_-]{20,}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{30,}|xox[abprs]-[\w-]{10,}|hf_[A-Za-z0-9]{30,}|glpat-[\w-]{20,})",
    "an AWS key": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "a signed token": r"\beyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,}",
    "a password": r"(?i:\bpassword\s*[:=]\s*)(?!\S*[<{\[*])\S{6,}",
}
PERSONAL = {
    "an e-mail address": r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.)+[A-Za-z]{2,18}\b",
    "a card number": r"\b(?:\d[ -]?){13,19}\b",
    "a bank account": r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b",
    "a phone number": r"(?<![\w.])(?:\+\d{1,3}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}|\(\d{3}\) ?\d{3}-\d{4}|\d{3}-\d{3}-\d{4})(?!\w)",
}
_SAFE_MAIL = re.compile(r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|invalid|test|localhost)\b", re.IGNORECASE)
_ALL = [(name, "secret", re.compile(pattern)) for name, pattern in SECRETS.items()]
_ALL += [(name, "personal_data", re.compile(pattern)) for name, pattern in PERSONAL.items()]
_NUMBER = re.compile(r"\d(?:[ .()-]{0,2}\d){6}")
_ACCOUNT = re.compile(r"[A-Z]{2}\d{2}")
_NEEDS: dict[str, tuple[str, ...] | re.Pattern[str]] = {
    "a private key": ("PRIVATE KEY",),
    "an API key": ("sk-", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "xox", "hf_", "glpat-"),
    "an AWS key": ("AKIA", "ASIA"),
    "a signed token": ("eyJ",),
    "a password": ("assword", "ASSWORD"),
    "an e-mail address": ("@",),
    "a card number": _NUMBER,
    "a bank account": _ACCOUNT,
    "a phone number": _NUMBER,
}
"""What must be there for a pattern to be worth trying: most texts have none of it, and these are cheap to look for."""


def find(text: str) -> list[tuple[str, str, int, int]]:
    """(rule, what it looks like, start, end) of each place; made-up addresses such as a@example.com are let pass."""
    found: list[tuple[str, str, int, int]] = []
    for name, rule, pattern in _ALL:
        for match in pattern.finditer(text) if _worth_trying(name, text) else ():
            if _real(name, match.group()) and not any(start < match.end() and match.start() < end for _, _, start, end in found):
                found.append((rule, name, match.start(), match.end()))
    return found


def _worth_trying(name: str, text: str) -> bool:
    needed = _NEEDS[name]
    return any(word in text for word in needed) if isinstance(needed, tuple) else needed.search(text) is not None


def mask(text: str) -> str:
    """The text with a placeholder in each such place: [e-mail address], [API key]."""
    for _, name, start, end in sorted(find(text), key=lambda place: -place[2]):
        text = f"{text[:start]}[{name.split(' ', 1)[1]}]{text[end:]}"
    return text


def _real(name: str, text: str) -> bool:
    if name == "an e-mail address":
        return not _SAFE_MAIL.search(text)
    if name == "a card number":
        digits = [int(character) for character in text if character.isdigit()]
        return 13 <= len(digits) <= 19 and len(set(digits)) > 1 and _luhn(digits)
    return True


def _luhn(digits: list[int]) -> bool:
    doubled = [digit if place % 2 == 0 else sum(divmod(2 * digit, 10)) for place, digit in enumerate(reversed(digits))]
    return sum(doubled) % 10 == 0


class Secrets(Rule):
    def see(self, seen: Seen) -> None:
        for column, text in seen.texts:
            told: set[str] = set()
            for rule, name, start, end in find(text):
                if name in told:
                    continue
                told.add(name)
                message = f"The text holds what looks like {name}; a model may repeat it to anyone."
                hidden = text[start : start + 3] + "…" if rule == "secret" else text[start:end]
                self.say(seen.line, Finding(rule, message, column, hidden, "warning", fix("Put a placeholder there", "mask")))
