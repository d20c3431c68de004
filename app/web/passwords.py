"""Passwords: hashed with argon2id, with limits on attempts and on concurrency.

An attempt is counted before it is checked, so that concurrent ones count as sequential ones do; the right password gives its own
count back. Three counts limit attempts: by account and network, by account, and by network over all accounts. A browser that was
signed in before has a cookie (`app.web.auth.known_browser`) and a count of its own instead, so that a stranger's attempts, even
from the same address, do not lock out the owner.

Argon2 takes tens of milliseconds and 64 MB; two run at once, a few wait, and more are refused. It never runs in the threads that
serve pages.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

from app.errors import BadField, TooMany
from app.kit.addresses import network_of
from app.languages import gettext

T = TypeVar("T")

MIN_LENGTH, MAX_LENGTH = 10, 1000
AT_ONCE = 2
MAX_WAITING = 16
"""Attempts that may wait for their turn, about a second's worth."""

COUNTED_SECONDS = 86_400
FIRST_WAIT_SECONDS = 30


class AttemptLimit(NamedTuple):
    """Free attempts; each further one doubles the wait, from half a minute to `max_wait_seconds`."""

    free: int
    max_wait_seconds: int


PAIR = AttemptLimit(5, 900)
"""One account from one network, or from one known browser."""
NETWORK = AttemptLimit(30, 900)
ACCOUNT = AttemptLimit(30, 60)
"""One account from everywhere. Its wait stays short: it also affects an owner with a new browser, who has the sign-in link."""


def _hasher() -> Any:
    from pwdlib import PasswordHash  # argon2 is only loaded by those who sign in with a password

    return PasswordHash.recommended()


def hash_of(password: str) -> str:
    return str(_hasher().hash(password))


def matches(password: str, known: str | None) -> bool:
    """Whether the password has this hash. Without one it takes as long, so that the time does not reveal which names exist."""
    right = bool(_hasher().verify(password, known or _nobody()))
    return right and known is not None


@cache
def _nobody() -> str:
    """A hash that no password matches."""
    return hash_of(secrets.token_hex(16))


# Judging --------------------------------------------------------------------------------------------------------------

_judges = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="password")
_judging = 0


async def judge(password: str, known: str | None) -> bool:
    """`matches`, in a dedicated thread. Raises TooMany when too many wait already."""
    return await _in_turn(matches, password, known)


async def new_hash(password: str, field: str = "password") -> str:
    """The hash of a password that a person chose. Raises BadField where it is too short or too long."""
    if not MIN_LENGTH <= len(password) <= MAX_LENGTH:
        raise BadField(
            gettext(
                "A password has %(least)s to %(most)s characters; this one has %(num)s.",
                least=MIN_LENGTH,
                most=MAX_LENGTH,
                num=len(password),
            ),
            hint=gettext("A few words with spaces between them are easy to remember."),
            param=field,
        )
    return await _in_turn(hash_of, password)


async def _in_turn(action: Callable[..., T], *given: Any) -> T:
    global _judging
    if _judging >= AT_ONCE + MAX_WAITING:
        message = gettext("Too many people are signing in at this moment.")
        raise TooMany(message, hint=gettext("Try again in a few seconds."), retry_after_seconds=2.0)
    _judging += 1
    try:
        return await asyncio.get_running_loop().run_in_executor(_judges, action, *given)
    finally:
        _judging -= 1


# Counting -------------------------------------------------------------------------------------------------------------

_TAKE = """
local wait = 0
for i = 1, #KEYS, 2 do wait = math.max(wait, redis.call('PTTL', KEYS[i + 1])) end
if wait > 0 then return wait end
for i = 1, #KEYS, 2 do
    local free, most = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
    local count = redis.call('INCR', KEYS[i])
    redis.call('EXPIRE', KEYS[i], tonumber(ARGV[#ARGV - 1]))
    if count >= free then
        redis.call('SET', KEYS[i + 1], 1, 'EX', math.min(tonumber(ARGV[#ARGV]) * 2 ^ math.min(count - free, 10), most))
    end
end
return 0
"""
"""Take one attempt from every count, or none: returns the milliseconds to wait where one of them is used up. One script, because
it must be atomic."""


class Tries:
    """The counts of one attempt, in Redis so that all web processes share them."""

    def __init__(self, name: str, address: str, browser: str | None = None) -> None:
        from app.queue import PREFIX, get_redis

        self.redis = get_redis()
        network = network_of(address)
        named = {f"browser|{browser}|{name}": PAIR} if browser else {f"pair|{network}|{name}": PAIR, f"account|{name}": ACCOUNT}
        if not browser:
            named[f"network|{network}"] = NETWORK
        self.limits = {f"{PREFIX}tries:{sha256(key.encode()).hexdigest()}": limit for key, limit in named.items()}

    def take(self) -> None:
        """Count this attempt. Raises TooMany where it is not allowed yet; such a one is not counted."""
        keys = [part for key in self.limits for part in (key, f"{key}:wait")]
        numbers = [part for limit in self.limits.values() for part in limit]
        wait = int(self.redis.eval(_TAKE, len(keys), *keys, *numbers, COUNTED_SECONDS, FIRST_WAIT_SECONDS))
        if wait > 0:
            seconds = -(-wait // 1000)
            raise TooMany(
                gettext("Too many failed sign-ins."),
                hint=gettext("Wait %(num)s seconds, or use a sign-in link from `luthier link`.", num=seconds),
                retry_after_seconds=float(seconds),
            )

    def forget(self) -> None:
        """The password was right. The network's count only gets this attempt back: otherwise one account would reset it for
        guessing others."""
        for key, limit in self.limits.items():
            if limit is not NETWORK or int(self.redis.decr(key)) < limit.free:
                self.redis.delete(f"{key}:wait")
            if limit is not NETWORK:
                self.redis.delete(key)
