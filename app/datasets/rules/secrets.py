"""Secrets and personal data: keys, passwords, e-mail addresses, phone, card and account numbers. A model memorizes them.

A pattern finds candidates, and a check of its own removes false positives: version numbers, dates, hashes, names in code,
placeholders. What has a checksum must have the right one.

The time is linear in the length of a text: every repetition is bounded, or what it may match ends where no other match can begin.
`tests/security/test_linear.py` doubles hostile texts.
"""

from __future__ import annotations

import re
from bisect import bisect
from collections.abc import Callable
from typing import NamedTuple

from app.datasets.rules._base import Rule, Seen
from app.formats import RowFinding
from app.formats._base import fix

# Checks: (match, the text that is hidden) → whether it is real --------------------------------------------------------


_PLACEHOLDER = re.compile(
    r"your|placeholder|dummy|change.?me|redacted|xxx|\*{3}|\.{3}|(.)\1{5}|^(?:sha\d|md5|base\d|utf\d|argon2|pbkdf2)", re.IGNORECASE
)
_DOTTED_NAME = re.compile(r"[A-Za-z_]\w*(?:(?:\.|->|::)[A-Za-z_]\w*)+")


def _drawn(found: re.Match[str], text: str) -> bool:
    """Letters and digits as a random generator draws them, not words joined by hyphens."""
    longest = max(re.findall(r"[A-Za-z0-9]+", text), key=len)
    return len(longest) >= 12 and len(set(text)) >= 10 and re.search(r"\d", text) is not None and not _PLACEHOLDER.search(text)


def _token(found: re.Match[str], text: str) -> bool:
    """A random value that is no name in code: nothing is called, indexed or looked up in it. Checked here and not by the pattern,
    which would start again at every `secret=` within the same run."""
    after = found.string[found.end() : found.end() + 1]
    return not (after.isalnum() or after in ("_", "(", "[", ".")) and _drawn(found, text)


def _password(found: re.Match[str], text: str) -> bool:
    """Letters mixed with digits or signs: neither a word, nor a number, nor a name in code."""
    mixed = re.search(r"[A-Za-z]", text) and re.search(r"[0-9!#$%&*?@^+~]", text)
    return bool(mixed) and not _PLACEHOLDER.search(text) and not _DOTTED_NAME.fullmatch(text)


def _key_block(found: re.Match[str], text: str) -> bool:
    return re.search(r"[A-Za-z0-9+/]{24}", text) is not None


_MADE_UP_MAIL = re.compile(
    r"@(?:[\w-]+\.)*(?:example\.(?:com|org|net)|example|invalid|test|localhost)$|^(?:no|do.?not).?reply@"
    r"|^(?:user|name|you|your.?name|someone|email)(?:name)?\d?@(?:your-?)?(?:domain|company|email|e-?mail|mail|site|website)\.\w+$"
    r"|@\d+(?:\.\d+)+|@\dx\.\w+$|\.(?:png|jpe?g|gif|svg|webp)$",
    re.IGNORECASE,
)
"""Example addresses, and versions and pictures that only look like an address: `pkg@1.2.3-rc.ab`, `logo@2x.png`."""


def _mail(found: re.Match[str], text: str) -> bool:
    before, after = found.string[max(0, found.start() - 80) : found.start()], found.string[found.end() : found.end() + 1]
    of_address = re.search(r"://[^\s/@]*$", before) is not None  # user:password@host of a URL
    return not of_address and not (text.startswith("git@") and after in ":/") and not _MADE_UP_MAIL.search(text)


_CARD = re.compile(r"4\d{15}|4\d{18}|5[1-5]\d{14}|2(?:22[1-9]|2[3-9]\d|[3-6]\d\d|7[01]\d|720)\d{12}|3[47]\d{13}"
                   r"|6(?:011|4[4-9]\d|5\d\d)\d{12}|35(?:2[89]|[3-8]\d)\d{12}|3(?:0[0-5]|[68]\d)\d{11}|62\d{14,17}")  # fmt: skip
"""Visa, Mastercard, American Express, Discover, JCB, Diners Club and UnionPay, by their prefixes and lengths."""


def _card(found: re.Match[str], text: str) -> bool:
    number = re.sub(r"\D", "", text)
    doubled = [int(digit) if place % 2 == 0 else sum(divmod(2 * int(digit), 10)) for place, digit in enumerate(reversed(number))]
    return _CARD.fullmatch(number) is not None and sum(doubled) % 10 == 0 and len(set(number)) > 1  # the Luhn checksum


_IBAN_LENGTHS = {
    **dict.fromkeys(("NO",), 15), **dict.fromkeys(("BE",), 16), **dict.fromkeys(("DK", "FI", "NL"), 18), **dict.fromkeys(("MK", "SI"), 19),
    **dict.fromkeys(("AT", "EE", "LT", "LU", "XK", "BA"), 20), **dict.fromkeys(("HR", "LI", "LV", "CH"), 21),
    **dict.fromkeys(("BG", "DE", "GB", "IE", "GE", "ME", "RS", "BH"), 22), **dict.fromkeys(("AE", "IL", "GI"), 23),
    **dict.fromkeys(("CZ", "ES", "MD", "PK", "RO", "SA", "SE", "SK", "AD", "TN"), 24), **dict.fromkeys(("PT",), 25), **dict.fromkeys(("IS", "TR"), 26),
    **dict.fromkeys(("FR", "GR", "IT", "MC", "SM"), 27), **dict.fromkeys(("AL", "CY", "HU", "LB", "PL", "AZ"), 28), **dict.fromkeys(("BR", "UA", "QA"), 29),
    **dict.fromkeys(("JO", "KW"), 30), **dict.fromkeys(("MT", "MU"), 31),
}  # fmt: skip
"""Length of an account number by its country (ISO 13616)."""


def _iban(found: re.Match[str], text: str) -> bool:
    number = text.replace(" ", "")[: _IBAN_LENGTHS.get(text[:2], 0)]
    if len(number) < 15 or len(number) != _IBAN_LENGTHS[text[:2]]:
        return False
    return int("".join(str(int(character, 36)) for character in number[4:] + number[:4])) % 97 == 1


def _phone(found: re.Match[str], text: str) -> bool:
    """As many digits as a phone number has (E.164), grouped as no sum or amount is."""
    digits, groups = re.sub(r"\D", "", text), re.findall(r"\d+", text)
    before = found.string[max(0, found.start() - 3) : found.start()].rstrip()
    if text.startswith("+"):
        summand = before[-1:].isdigit() or before[-1:] in ("=", "+", "-", "*", "/", ")", "]")
        if (summand and not found.string[: found.start()].endswith("tel:")) or (len(groups) == 2 and "." in text):
            return False
        if not (8 if len(groups) > 1 else 10) <= len(digits) <= 15:
            return False
    return "000" not in groups


# Kinds ----------------------------------------------------------------------------------------------------------------


class SecretKind(NamedTuple):
    """One kind of secret or personal data: a text must contain one of `needs`, or seven digits close to each other, for the
    pattern to be tried; most texts do not, and that is cheap to check. Where the pattern has a group `v`, only that is hidden."""

    name: str
    rule: str
    needs: tuple[str, ...] | None
    pattern: re.Pattern[str]
    real: Callable[[re.Match[str], str], bool]


_SEVEN_DIGITS = re.compile(r"\d(?:[ .()/-]{0,2}\d){6}")
_HOLDS = r"""["']?\s*[:=]\s*(?:Bearer\s+)?["'`]?"""
KINDS = (
    SecretKind("a private key", "secret", ("PRIVATE KEY",), re.compile(
        r"-----BEGIN (?:[A-Z]+ )?PRIVATE KEY(?: BLOCK)?-----(?:(?:(?!-----)[\s\S]){0,20000}-----END (?:[A-Z]+ )?PRIVATE KEY(?: BLOCK)?-----|[A-Za-z0-9+/=\s\\]+)"
    ), _key_block),
    SecretKind("an API key", "secret", ("sk-", "AIza", "ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_", "xox", "hf_", "glpat-", "sk_", "rk_", "npm_", "pypi-", "SG.", "ya29.", "gsk_", "dop_v1_"), re.compile(
        r"(?<![A-Za-z0-9_-])(?:sk-(?:[a-z]+-)?[\w-]{20,}|AIza[\w-]{35}|gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|xox[abeprs]-[\w-]{10,}|hf_[A-Za-z0-9]{30,}"
        r"|glpat-[\w-]{20,}|[sr]k_(?:live|test)_[A-Za-z0-9]{16,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}|SG\.[\w-]{16,32}\.[\w-]{16,64}|ya29\.[\w-]{20,}"
        r"|gsk_[A-Za-z0-9]{40,}|dop_v1_[a-f0-9]{64})", re.ASCII
    ), lambda found, text: text.startswith(("AIza", "xox", "SG.", "ya29.")) or _drawn(found, text)),
    SecretKind("an AWS key", "secret", ("AKIA", "ASIA"), re.compile(r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b"), lambda found, text: True),
    SecretKind("a signed token", "secret", ("eyJ",), re.compile(  # looked at from the start of a run of such letters alone, once it is seen to end well
        r"(?<![\w-])(?=[\w-]++\.eyJ[\w-]{10,}+\.[\w-]{10})[\w-]*?\b(?P<v>eyJ[\w-]{10,}\.eyJ[\w-]{10,}\.[\w-]{10,})"
    ), lambda found, text: True),
    SecretKind("a key or token", "secret", ("key", "KEY", "Key", "ecret", "ECRET", "oken", "OKEN", "uthorization"), re.compile(
        rf"(?i)(?:api[_-]?key|access[_-]?key(?:[_-]?id)?|secret(?:[_-]?key)?|(?:access|auth|api|refresh)[_-]?token|authorization){_HOLDS}(?P<v>[A-Za-z0-9_/+=-]{{16,}}+)"
    ), _token),
    SecretKind("a password", "secret", ("://",), re.compile(r"\b[a-z][a-z0-9+.-]{1,20}://[^\s/:@]{0,64}:(?P<v>[^\s/:@]{4,100})@"), _password),
    SecretKind("a password", "secret", ("assword", "ASSWORD", "asswort", "asswd", "ASSWD", "assphrase", "ASSPHRASE", "pwd", "PWD"), re.compile(
        rf"""(?i)(?<![a-z])(?:\w{1,30}_)?(?:pass(?:wor[dt]|wd|phrase)|pwd){_HOLDS}(?P<v>[^\s"'`,;()<>\[\]{{}}]{{6,100}}+)(?![\w(\[{{<])"""
    ), _password),
    SecretKind("an e-mail address", "personal_data", ("@",), re.compile(r"\b[\w.+-]{1,64}@(?:[\w-]{1,63}\.){1,12}[A-Za-z]{2,18}\b"), _mail),
    SecretKind("a card number", "personal_data", None, re.compile(r"(?<![\w.-])(?:\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?:\1?\d{3})?|\d{4}([ -]?)\d{6}\2\d{4,5})(?![\w-]|\.\d)"), _card),
    SecretKind("a bank account", "personal_data", None, re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b"), _iban),
    SecretKind("a social security number", "personal_data", None, re.compile(r"(?<![\w.-])(?!000|666|9)\d{3}-(?!00)\d\d-(?!0000)\d{4}(?![\w-])"), lambda found, text: True),
    SecretKind("a phone number", "personal_data", None, re.compile(
        r"(?<![\w.])(?:\+[1-9]\d{0,2}[ .-]?(?:\(?\d{1,4}\)?[ .-]?){2,5}\d{2,4}|\+[1-9]\d{9,14}|(?:\((?:[2-9]\d\d|123)\) ?|(?<!-)(?:[2-9]\d\d|123)-)\d{3}-\d{4}"
        r"|(?<!\d[ .])0[1-9](?:[ .]\d\d){4}(?![ .]?\d)|07\d{3} \d{3} ?\d{3}|01[5-7]\d{1,2}[ /-]\d{6,8}|00[1-9]\d{0,2}(?:[ /-]\d{2,12}){2,7}"
        r"|(?i:(?:tel|phone|telephone|call|mobile|cell|fax|telefon|handy|mobil|tél)(?:\.|:|\.:| number| no\.)?:? {0,2})(?P<v>\(?0\d{1,4}\)?[ /-]?\d[\d /-]{4,12}\d))(?![\w-])"
    ), _phone),
)  # fmt: skip
"""In order of precedence: a span belongs to the first kind that claims it."""


def find(text: str) -> list[tuple[str, str, int, int]]:
    """(rule, what it looks like, start, end) of each span that a model should not memorize, in the order of the kinds."""
    found: list[tuple[str, str, int, int]] = []
    taken: list[tuple[int, int]] = []  # the same spans sorted by position; they do not overlap
    many_digits = _SEVEN_DIGITS.search(text) is not None
    for kind in KINDS:
        if not (many_digits if kind.needs is None else any(word in text for word in kind.needs)):
            continue
        places: list[tuple[int, int]] = []
        for match in kind.pattern.finditer(text):
            start, end = match.span("v" if match.re.groupindex and match["v"] is not None else 0)
            end = start + len(text[start:end].rstrip(" .,;:"))
            if kind.real(match, text[start:end]) and _is_free(taken, start, end):
                places.append((start, end))
        found += [(kind.rule, kind.name, start, end) for start, end in places]
        taken = sorted([*taken, *places])
    return found


def _is_free(taken: list[tuple[int, int]], start: int, end: int) -> bool:
    at = bisect(taken, (start, end))
    return (at == 0 or taken[at - 1][1] <= start) and (at == len(taken) or end <= taken[at][0])


def mask(text: str) -> str:
    """The text with a placeholder for each such span: [e-mail address], [API key]."""
    parts, at = list[str](), 0
    for _, name, start, end in sorted(find(text), key=lambda place: place[2]):
        parts += [text[at:start], f"[{name.split(' ', 1)[1]}]"]
        at = end
    return "".join([*parts, text[at:]])


MAX_LOOKED_AT = 1 << 20
"""Characters of one text that are checked while a file is parsed; more than any model reads at once. `mask` covers all."""


class Secrets(Rule):
    def see(self, seen: Seen) -> None:
        for column, text in seen.texts:
            if len(text) > MAX_LOOKED_AT:
                beyond = f"Only the first {MAX_LOOKED_AT:,} of its {len(text):,} characters were looked at for secrets and personal data."
                self.say(
                    seen.line, RowFinding("not_looked_at", f"{beyond} Split the text to have all of it looked at.", column, severity="note")
                )
            told: set[str] = set()
            for rule, name, start, end in find(text[:MAX_LOOKED_AT]):
                if name in told:
                    continue
                told.add(name)
                message = f"The text holds what looks like {name}; a model may repeat it to anyone."
                hidden = text[start : start + 3] + "…" if rule == "secret" else text[start:end]
                self.say(seen.line, RowFinding(rule, message, column, hidden, "warning", fix("Redact", "mask")))
