"""One-time codes against the numbers printed in RFC 6238."""

from __future__ import annotations

import base64
from urllib.parse import parse_qs, urlsplit

import pytest

from app.kit import totp

SECRET = b"12345678901234567890"


@pytest.mark.parametrize(
    ("seconds", "code"),
    [
        (59, "94287082"),
        (1111111109, "07081804"),
        (1111111111, "14050471"),
        (1234567890, "89005924"),
        (2000000000, "69279037"),
        (20000000000, "65353130"),
    ],
)
def test_the_codes_are_those_of_the_standard(seconds, code):
    """Appendix B prints eight digits; six are the last ones of them."""
    assert totp.code_at(SECRET, seconds // 30) == code[-6:]
    assert totp.step_of(SECRET, code[-6:], seconds) == seconds // 30


def test_a_clock_may_be_a_step_early_or_late_and_no_more():
    code = totp.code_at(SECRET, 1000)
    assert [totp.step_of(SECRET, code, 30 * step) for step in (998, 999, 1000, 1001, 1002)] == [None, 1000, 1000, 1000, None]
    for wrong in ("", "0", "é", code + "0", "00000a"):
        assert totp.step_of(SECRET, wrong, 30_000) is None


def test_an_app_reads_the_secret_back():
    found = urlsplit(totp.uri(SECRET, "Luthier", "Ada & Bo: x"))
    assert (found.scheme, found.netloc) == ("otpauth", "totp") and found.path == "/Luthier%3AAda%20%26%20Bo%3A%20x"
    text = parse_qs(found.query)["secret"][0]
    assert base64.b32decode(text + "=" * (-len(text) % 8)) == SECRET
