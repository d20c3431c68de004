"""llama.cpp servers of a worker against the built-in engine: the same answers, and nothing is left of a server that has gone."""

from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest

from app.errors import StudioError
from app.inference import llama_cpp as rules
from app.inference.protocol import Sampling
from app.settings import get_settings
from tests.worker.inference.test_engine import PROMPTS, engine, home, make_adapter, ref_of, request, run  # noqa: F401  (fixtures)
from worker.inference import llama_cpp, model_cache
from worker.inference.request import rendered


@pytest.fixture
def servers(engine):  # noqa: F811
    found = llama_cpp.LlamaServers(engine.shelf)
    yield found
    for key, server in list(found.running.items()):
        found._drop(key, server)
    model_cache.ALL.remove(found)


class Llama:
    """The servers with the face of the engine."""

    def __init__(self, servers, kind="F32"):
        self.servers, self.kind = servers, kind

    def answer(self, asked):
        adapter = asked.model.adapters[0].path if asked.model.adapters else None
        asked = asked.model_copy(update={"engine": rules.engine(self.kind, adapter)})
        return self.servers.answer(asked, rendered(asked, self.servers.shelf))


@pytest.mark.long
def test_greedy_answers_are_those_of_the_engine(engine, servers, home):  # noqa: F811
    ref = ref_of(home)
    for prompt in PROMPTS:
        ours, theirs = run(engine, request(ref, prompt)), run(Llama(servers), request(ref, prompt))
        assert theirs[0] == ours[0] and theirs[1] == ours[1]
        assert (theirs[2].prompt_tokens, theirs[2].completion_tokens) == (ours[2].prompt_tokens, ours[2].completion_tokens)
    assert len(servers.running) == 1


@pytest.mark.long
def test_an_adapter_is_on_its_model(engine, servers, home):  # noqa: F811
    adapter = make_adapter(home / "runs" / "a", home / "models" / "tiny", 3)
    plain, tuned = ref_of(home), ref_of(home, adapters=[adapter])
    for prompt in PROMPTS[:3]:
        assert run(Llama(servers), request(tuned, prompt))[0] == run(engine, request(tuned, prompt))[0]
    assert run(Llama(servers), request(tuned, PROMPTS[0]))[0] != run(Llama(servers), request(plain, PROMPTS[0]))[0]
    assert len(servers.running) == 2


@pytest.mark.long
def test_logprobs_stops_and_penalties_are_those_of_the_engine(engine, servers, home):  # noqa: F811
    ref = ref_of(home)
    (whole,), _, _ = run(engine, request(ref, PROMPTS[1]))
    stop = whole[6:9]
    for more in ({"stop": (stop,)}, {"repetition_penalty": 1.3}, {"logit_bias": {70: 100.0}, "max_tokens": 5}, {"max_tokens": 3}):
        ours, theirs = run(engine, request(ref, PROMPTS[1], **more)), run(Llama(servers), request(ref, PROMPTS[1], **more))
        assert theirs[:2] == ours[:2], more
    more = {"logprobs": True, "top_logprobs": 3, "max_tokens": 8}
    parts = [
        [
            one
            for entries in answerer.answer(request(ref, PROMPTS[1], **more))
            for entry in entries
            if entry.type == "text"
            for one in entry.logprobs
        ]
        for answerer in (engine, Llama(servers))
    ]
    assert [one.token for one in parts[1]] == [one.token for one in parts[0]] and len(parts[0]) == 8
    for ours, theirs in zip(*parts, strict=True):
        assert theirs.logprob == pytest.approx(ours.logprob, abs=1e-2)
        assert [one.token for one in theirs.top] == [one.token for one in ours.top]


@pytest.mark.long
def test_a_seed_gives_the_same_answer_and_many_are_answered_at_once(servers, home):  # noqa: F811
    ref, found = ref_of(home), {}

    def ask(n):
        found[n] = run(Llama(servers), request(ref, PROMPTS[n % 2], seed=7 + n // 8, temperature=1.0, max_tokens=40))[0]

    for n in (0, 1):
        ask(n)
    alone = dict(found)
    threads = [threading.Thread(target=ask, args=[n]) for n in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(found[n] == alone[n % 2] for n in range(8)) and found[8] != found[0], "another seed, another answer"
    assert len(servers.running) == 1 and next(iter(servers.running.values())).users == 0


@pytest.mark.long
def test_who_leaves_stops_it_and_a_server_that_died_starts_anew(servers, home):  # noqa: F811
    ref = ref_of(home)
    answer = Llama(servers).answer(request(ref, PROMPTS[0], max_tokens=400, logit_bias={70: 100.0}))
    assert any(entry.type == "text" for _ in range(20) for entry in next(answer))
    (server,) = servers.running.values()
    assert server.users == 1 and servers.evict(time.monotonic()) == 0, "one that answers is not put away"
    answer.close()
    assert server.users == 0

    answer = Llama(servers).answer(request(ref, PROMPTS[0], max_tokens=400, logit_bias={70: 100.0}))
    next(answer)
    os.killpg(server.child.pid, signal.SIGKILL)
    with pytest.raises(StudioError, match="has ended while it was answering") as caught:
        for _ in answer:
            pass
    assert caught.value.code == "worker_lost"
    assert run(Llama(servers), request(ref, PROMPTS[0]))[0][0]
    (again,) = servers.running.values()
    assert again is not server


@pytest.mark.long
def test_what_the_server_refuses_is_an_error(servers, home):  # noqa: F811
    ref = ref_of(home)
    run(Llama(servers), request(ref, PROMPTS[0]))
    (server,) = servers.running.values()
    server.address = server.address._replace(key="wrong")
    with pytest.raises(StudioError, match="refuses the studio's key"):
        run(Llama(servers), request(ref, PROMPTS[0]))
    assert server.users == 0


@pytest.mark.long
def test_files_are_written_once_and_servers_are_put_away(servers, home):  # noqa: F811
    ref = ref_of(home)
    run(Llama(servers), request(ref, PROMPTS[0]))
    folder = get_settings().folder("cache", "gguf")
    (file,) = folder.iterdir()
    written, (server,) = file.stat().st_ino, servers.running.values()
    assert server.bytes >= file.stat().st_size / 2 and servers.shelf.memory() >= server.bytes
    assert [one.path for one in servers.ready()] == ["models/tiny"]
    pid = server.child.pid
    assert servers.evict(time.monotonic()) == 1 and not psutil.pid_exists(pid) and servers.ready() == []
    run(Llama(servers), request(ref, PROMPTS[0]))
    assert file.stat().st_ino == written


@pytest.mark.long
def test_a_file_that_llama_cpp_refuses_is_an_error_with_its_reason(servers, home):  # noqa: F811
    ref = ref_of(home)
    run(Llama(servers), request(ref, PROMPTS[0]))
    (file,) = get_settings().folder("cache", "gguf").iterdir()
    servers.evict(time.monotonic())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(StudioError) as caught:
        run(Llama(servers), request(ref, PROMPTS[0]))
    assert caught.value.code == "engine_failed" and "llama.cpp" in caught.value.message
    assert servers.running == {}


def test_too_little_memory_is_said_before_the_start(servers, home):  # noqa: F811
    servers.shelf.memory_bytes = 1000
    with pytest.raises(StudioError, match="the playground may use"):
        run(Llama(servers), request(ref_of(home), PROMPTS[0]))
    assert list(get_settings().folder("cache", "gguf").iterdir()) == []


def test_as_many_at_once_as_there_is_memory_for():
    assert llama_cpp.parallel_for(100, 10, 10_000) == 8
    assert llama_cpp.parallel_for(100, 10, 300) == 4
    assert llama_cpp.parallel_for(100, 1000, 300) == 1


def test_files_that_were_not_used_for_longest_go_first(tmp_path, monkeypatch):
    for age in range(4):
        path = tmp_path / f"{age}.gguf"
        path.write_bytes(b"x" * 100)
        os.utime(path, (1000 - age, 1000 - age))
    monkeypatch.setattr(llama_cpp, "CACHE_BYTES", 250)
    llama_cpp.prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0.gguf", "1.gguf"]


def test_what_it_samples_otherwise_stays_with_the_engine():
    assert rules.answers(Sampling()) and not rules.answers(Sampling(frequency_penalty=0.5)) and not rules.answers(Sampling(n=2))
