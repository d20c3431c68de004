"""Children with limits: their results, their refusals, and every way they can be ended."""

import os
import time

import pytest

from app.errors import BadData
from app.kit import sandbox
from app.kit.sandbox import Killed, Limits, Refused
from app.ops.embedded import sweep


def double(payload, say):
    for part in range(3):
        say({"part": part})
    print("a stray line")
    return {"twice": payload["n"] * 2, "environment": dict(os.environ), "folder": os.getcwd()}


def much(payload, say):
    return ["x" * 1000] * 12_000


def refuse(payload, say):
    raise BadData("It is wrong.", hint="Mend it.")


def crash(payload, say):
    raise KeyError("unexpected")


def eat(payload, say):
    return len([bytearray(10 << 20) for _ in range(10_000)])


def spin(payload, say):
    while True:
        pass


def sleep(payload, say):
    time.sleep(60)


def write(payload, say):
    with open("big", "wb") as file:
        for _ in range(100):
            file.write(bytes(1 << 20))


def die(payload, say):
    os.abort()


def run(function, tmp_path, limits=None, **rest):
    return sandbox.run(f"tests.kit.test_sandbox:{function}", {"n": 21}, limits, folder=tmp_path, **rest)


def test_messages_then_a_result_with_an_empty_environment_and_no_trace_left(tmp_path, monkeypatch):
    monkeypatch.setenv("LUTHIER_DATABASE_URL", "postgresql://secret")
    monkeypatch.setenv(sweep.MARK, "here:1")
    messages = []
    result = run("double", tmp_path, on_message=messages.append)
    assert result["twice"] == 42
    *said, last = messages
    assert said == [{"part": 0}, {"part": 1}, {"part": 2}] and 10 << 20 < last["peak_bytes"] < 200 << 20
    assert {name for name in result["environment"] if "LUTHIER" in name} == {sweep.MARK, "LUTHIER_CONFINED"}
    assert result["environment"][sweep.MARK] == "here:1", "the warden would not know it"
    assert result["folder"].startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_result_may_be_larger_than_any_message(tmp_path):
    assert len(run("much", tmp_path)) == 12_000 and sandbox.MAX_MESSAGE_BYTES < 12_000_000


def test_a_refusal_keeps_its_words(tmp_path):
    with pytest.raises(Refused) as caught:
        run("refuse", tmp_path)
    assert caught.value.error["message"] == "It is wrong."
    assert caught.value.error["hint"] == "Mend it."


@pytest.mark.parametrize(
    ("function", "limits", "kind"),
    [
        ("crash", Limits(), "crashed"),
        ("die", Limits(), "crashed"),
        ("eat", Limits(memory_bytes=300 << 20), "out_of_memory"),
        ("spin", Limits(cpu_seconds=1), "out_of_time"),
        ("sleep", Limits(seconds=1), "out_of_time"),
        ("write", Limits(file_bytes=5 << 20), "file_too_large"),
    ],
)
def test_every_end_has_its_kind(tmp_path, function, limits, kind):
    start = time.monotonic()
    with pytest.raises(Killed) as caught:
        run(function, tmp_path, limits)
    assert caught.value.kind == kind, caught.value.message
    assert time.monotonic() - start < 15
    assert list(tmp_path.iterdir()) == []


def test_it_ends_when_asked_to(tmp_path):
    with pytest.raises(Killed) as caught:
        run("sleep", tmp_path, keep_going=lambda: False)
    assert caught.value.kind == "stopped"
