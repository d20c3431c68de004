"""A chat template can harm nobody but the conversation that it is given."""

from __future__ import annotations

import copy
import os
import threading
import time
from pathlib import Path

import pytest

from app.errors import BadData, BadTemplate
from tests.security import bombs
from tests.security.bombs import MAX_SECONDS
from tests.tiny import build_tokenizer
from worker.data import template_pool
from worker.data.batch_rendering import render_rows
from worker.data.chat_template import prepare_tokenizer, render_prompt, render_row
from worker.data.template_pool import TemplateInput, write

GOOD, BOOM = ([{"role": "user", "content": text}] for text in ("What wood is it?", "BOOM"))
ROW = {"messages": [*GOOD, {"role": "assistant", "content": "Spruce."}]}
BAD_ROW = {"messages": [*BOOM, {"role": "assistant", "content": "Spruce."}]}


@pytest.fixture(scope="module")
def tokenizer():
    made = build_tokenizer()
    prepare_tokenizer(made)
    return made


@pytest.fixture
def own(tokenizer):
    return copy.deepcopy(tokenizer)


@pytest.fixture
def shorter(monkeypatch):
    """Less time for each, since there are so many."""
    monkeypatch.setattr(template_pool, "CPU_SECONDS", 0.25)


def peak_bytes(process: int | str = "self") -> int:
    return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024


def ended(tokenizer, template: str, messages=BOOM) -> BadData:
    """The error that a template ends in, in time and without this process growing."""
    before, began = peak_bytes(), time.monotonic()
    with pytest.raises(BadData) as caught:
        write(tokenizer, template, TemplateInput(messages, generate=True))
    assert time.monotonic() - began < MAX_SECONDS
    assert peak_bytes() - before < 64 << 20
    assert len(caught.value.message) < 1000 and caught.value.hint
    return caught.value


@pytest.mark.parametrize("name", bombs.GUARDED)
def test_a_bomb_behind_a_word_ends_with_an_error(tokenizer, shorter, name: str) -> None:
    template = bombs.guarded(bombs.GUARDED[name])
    assert write(tokenizer, template, TemplateInput(GOOD)).text == "<|im_start|>user\nWhat wood is it?<|im_end|>\n"
    ended(tokenizer, template)
    assert write(tokenizer, template, TemplateInput(GOOD)).text, "and the next conversation is written"


@pytest.mark.parametrize("name", bombs.WHOLE)
def test_a_template_that_is_a_bomb_as_a_whole(tokenizer, shorter, name: str) -> None:
    ended(tokenizer, bombs.WHOLE[name])


@pytest.mark.parametrize("template", bombs.ESCAPES)
def test_nothing_of_python_is_reached(tokenizer, template: str) -> None:
    try:
        text = write(tokenizer, template, TemplateInput(GOOD)).text
    except BadData as error:
        text = error.message
    assert not any(word in text for word in ("<class", "root:", "uid=", "<module", "built-in", "0x")), text


def test_the_limits_are_those_that_are_promised(tokenizer) -> None:
    assert template_pool.CPU_SECONDS <= 1 and template_pool.SECONDS <= 2
    write(tokenizer, bombs.PLAIN, TemplateInput(GOOD))
    child = next(one for one in template_pool._pool()._idle if one.kind.template == bombs.PLAIN)
    limits = dict(
        (line[:26].strip(), line[26:].split()[0]) for line in Path(f"/proc/{child.process.pid}/limits").read_text().splitlines()[1:]
    )
    assert int(limits["Max address space"]) == template_pool.MEMORY_BYTES <= 512 << 20
    assert limits["Max open files"] == "3" and limits["Max file size"] == limits["Max core file size"] == "0"
    environment = Path(f"/proc/{child.process.pid}/environ").read_bytes().split(b"\0")
    assert {line.partition(b"=")[0] for line in environment} <= {b"", b"TZ", b"LUTHIER_STUDIO", b"LD_LIBRARY_PATH", b"LC_CTYPE"}
    error = ended(tokenizer, bombs.guarded(bombs.GUARDED["late loops"]))
    assert (type(error), error.status, error.code) == (BadTemplate, 422, "chat_template_stopped") and "1 second" in error.message
    assert "512 MiB" in ended(tokenizer, bombs.guarded(bombs.GUARDED["a text times a number"])).message


@pytest.mark.long
def test_others_are_not_waited_for_while_bombs_go_off(tokenizer) -> None:
    bad = [bombs.guarded(bombs.GUARDED["late loops"]) + " " * n for n in range(3)]
    write(tokenizer, bombs.PLAIN, TemplateInput(GOOD))
    outcomes: list[type] = []

    def boom(template: str) -> None:
        began = time.monotonic()
        with pytest.raises((BadTemplate, template_pool.Unavailable)) as caught:
            write(tokenizer, template, TemplateInput(BOOM))
        assert time.monotonic() - began < MAX_SECONDS + template_pool.SECONDS / 2
        outcomes.append(caught.type)

    threads = [threading.Thread(target=boom, args=[template]) for template in [*bad, *bad, *bad]]
    for thread in threads:
        thread.start()
    times = []
    while any(thread.is_alive() for thread in threads):
        began = time.monotonic()
        write(tokenizer, bombs.PLAIN, TemplateInput(GOOD))
        times.append(time.monotonic() - began)
        time.sleep(0.01)
    assert len(outcomes) == len(threads) and BadTemplate in outcomes
    assert sorted(times)[len(times) // 2] < 0.1 and max(times) < 1.0


def test_no_process_outlives_the_one_that_started_it(tmp_path) -> None:
    import subprocess
    import sys

    script = (
        "import os, threading, time\nfrom tests.security import bombs\nfrom tests.tiny import build_tokenizer\n"
        "from worker.data import template_pool\ntokenizer = build_tokenizer()\n"
        "template_pool.write(tokenizer, bombs.PLAIN, template_pool.TemplateInput([{'role': 'user', 'content': 'a'}]))\n"
        "bomb = bombs.guarded(bombs.GUARDED['late loops'])\n"
        "chat = template_pool.TemplateInput([{'role': 'user', 'content': 'BOOM'}])\n"
        "threading.Thread(target=lambda: template_pool.write(tokenizer, bomb, chat), daemon=True).start()\n"
        "time.sleep(0.6)\n"
        "print(open(f'/proc/self/task/{os.getpid()}/children').read(), flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    children = done.stdout.split()
    assert children, done.stderr[-2000:]
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{child}").exists() and "template_child" in command(child) for child in children):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def command(process: str) -> str:
    try:
        return Path(f"/proc/{process}/cmdline").read_text()
    except OSError:
        return ""


# Rows of a dataset ----------------------------------------------------------------------------------------------------


def test_rows_that_set_off_a_bomb_are_refused_in_words_and_the_others_are_read(own, monkeypatch) -> None:
    monkeypatch.setattr(template_pool, "TROUBLE_SECONDS", 60.0)
    monkeypatch.setattr(template_pool, "CPU_SECONDS", 0.25)
    own.chat_template = bombs.guarded(bombs.GUARDED["late loops"])
    rows = [ROW] * 150 + [BAD_ROW] + [ROW] * 49
    found = render_rows(own, rows, "dialogue", 99)
    assert [place for place, one in enumerate(found) if isinstance(one, BadData)] == [150] and "was stopped" in found[150].message
    assert found[0] == found[-1] == render_row(own, ROW, "dialogue", 99)


def test_a_template_that_always_has_to_be_stopped_is_given_up(own, monkeypatch) -> None:
    monkeypatch.setattr(template_pool, "TROUBLE_SECONDS", 1.0)
    monkeypatch.setattr(template_pool, "CPU_SECONDS", 0.25)
    own.chat_template = bombs.guarded(bombs.GUARDED["late loops"]) + " "
    began = time.monotonic()
    found = render_rows(own, [BAD_ROW] * 3000, "dialogue", 99)
    assert len(found) == 3000 and all(isinstance(one, BadTemplate) for one in found)
    assert "too often" in found[-1].message and time.monotonic() - began < 4 * MAX_SECONDS


def test_a_row_of_endless_text_is_not_rendered(own, monkeypatch) -> None:
    from worker.data import chat_template

    monkeypatch.setattr(chat_template, "MAX_ROW_CHARACTERS", 1000)
    long = {"messages": [{"role": "user", "content": "a" * 600}, {"role": "assistant", "content": "b" * 600}]}
    with pytest.raises(BadData, match=r"has 1,2\d\d characters, and one may have 1,000"):
        render_row(own, long, "dialogue", 99)


# Prompts --------------------------------------------------------------------------------------------------------------


def test_a_prompt_far_too_long_is_refused_before_it_is_encoded(own, tiny_model) -> None:
    import json
    import uuid

    from app.errors import BadRequest
    from app.inference.protocol import GenerateRequest, Sampling
    from app.shapes import shape_of
    from app.spec import ModelRef
    from worker.inference.request import render

    shape = shape_of(json.loads((tiny_model / "config.json").read_text()))
    ref = ModelRef(id=uuid.uuid4(), name="tiny", kind="dialogue", path=".", revision="0" * 64, shape=shape)
    text = "The belly is made of spruce. " * 700_000

    def asked(**prompt):
        return GenerateRequest(id=uuid.uuid4(), owner=uuid.uuid4(), model=ref, sampling=Sampling(), seed=1, **prompt)

    for prompt in (
        {"prompt": text},
        {"messages": [{"role": "user", "content": text}]},
        {"messages": GOOD, "tools": [{"type": "function", "function": {"name": "a", "description": text}}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": text}]}]},
        {"tokens": [5] * 1_000_000},
    ):
        request = asked(**prompt)
        before, began = peak_bytes(), time.monotonic()
        with pytest.raises(BadRequest) as caught:
            render(request, own, 512)
        assert caught.value.code == "context_length_exceeded" and caught.value.status == 400
        assert time.monotonic() - began < 1.0 and peak_bytes() - before < 32 << 20

    spread = "{% for i in range(9999) %}{{ messages[0].content }}{% endfor %}"
    own.chat_template = spread
    with pytest.raises(BadRequest) as caught:
        render(asked(messages=GOOD), own, 512)
    assert caught.value.code == "context_length_exceeded"
    own.chat_template = bombs.PLAIN
    longest = "a" * (512 * max(map(len, own.get_vocab())))
    assert len(render(asked(prompt=longest), own, 512)[1]) > 512, "what may fit is encoded, and counted"


def test_a_prompt_is_the_same_in_and_out_of_a_process(own) -> None:
    text, ids = render_prompt(own, "dialogue", [*ROW["messages"], *GOOD])
    assert own.decode(ids) == text and os.getpid() not in [one.process.pid for one in template_pool._pool()._idle]
