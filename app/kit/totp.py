"""Time-based one-time codes (RFC 6238): six digits, half a minute each, HMAC-SHA-1 as every authenticator app computes them."""

from __future__ import annotations

import base64
import hmac
import struct
from urllib.parse import quote

STEP_SECONDS = 30
DIGITS = 6
DRIFT_STEPS = 1
"""Steps that a clock may be early or late."""


def code_at(secret: bytes, step: int) -> str:
    """The code of one step of the clock."""
    mark = hmac.new(secret, struct.pack(">Q", step), "sha1").digest()
    offset = mark[-1] & 15
    number = struct.unpack(">I", mark[offset : offset + 4])[0] & 0x7FFFFFFF
    return f"{number % 10**DIGITS:0{DIGITS}}"


def step_of(secret: bytes, code: str, seconds: float) -> int | None:
    """The step of the clock around `seconds` whose code this is; None where it is another one's."""
    now = int(seconds) // STEP_SECONDS
    given = code.encode()
    found = None
    for step in range(max(0, now - DRIFT_STEPS), now + DRIFT_STEPS + 1):
        if hmac.compare_digest(code_at(secret, step).encode(), given):
            found = step
    return found


def in_base32(secret: bytes) -> str:
    """As a person types it into an authenticator app."""
    return base64.b32encode(secret).decode().rstrip("=")


def uri(secret: bytes, issuer: str, account: str) -> str:
    """What an authenticator app reads from a link or a QR code."""
    label = quote(f"{issuer}:{account}", safe="")
    return f"otpauth://totp/{label}?secret={in_base32(secret)}&issuer={quote(issuer, safe='')}&digits={DIGITS}&period={STEP_SECONDS}"
