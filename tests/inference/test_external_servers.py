"""Engines outside: a server of another process takes over, and nothing else changes; what can go wrong with one, and what may not be called."""

from __future__ import annotations

import http.server
import json
import shutil
import subprocess
import sys
import threading
import time
import urllib.request

import openai
import pytest
from sqlalchemy import select

from app.errors import BadField, Unavailable
from app.inference import client as inference_client
from app.inference import external_server as wire
from app.inference import external_servers, playground
from app.inference.protocol import Sampling
from app.models import service as models
from app.settings import get_settings
from app.tables import Answer
from tests.conftest import PROJECT, free_port, studio_environment, wait_until
from tests.generating import _workers, answering_dir, generate_worker, register_tiny  # noqa: F401

ASK = [{"role": "user", "content": "What wood is the belly made of?"}]
KEY = "a-key/with:signs@it"


@pytest.fixture(scope="module")
def outside(answering_dir, tmp_path_factory):  # noqa: F811
    """A second process that answers as vLLM does; its address, and its address with the key as settings hold it."""
    port = free_port()
    log = (tmp_path_factory.mktemp("outside") / "log").open("wb")
    command = [sys.executable, "-m", "tests.outside", str(port), str(answering_dir / "models" / "tiny"), KEY]
    env = studio_environment(answering_dir) | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=PROJECT, env=env, stdout=log, stderr=log)
    wait_until(lambda: state(port) is not None or process.poll() is not None, what="the outside server", seconds=60)
    assert process.poll() is None
    yield port
    process.terminate()
    process.wait(10)


def state(port):
    asked = urllib.request.Request(f"http://127.0.0.1:{port}/state", headers={"authorization": f"Bearer {KEY}"})
    try:
        with urllib.request.urlopen(asked, timeout=5) as answer:
            return json.load(answer)
    except OSError:
        return None


def allow(monkeypatch, *addresses):
    monkeypatch.setenv("LUTHIER_ENGINES", ", ".join(addresses))
    get_settings.cache_clear()


@pytest.fixture
def url(outside, monkeypatch, session):
    from urllib.parse import quote

    allow(monkeypatch, f"http://:{quote(KEY, safe='')}@127.0.0.1:{outside}/v1/")
    return f"http://127.0.0.1:{outside}/v1"


@pytest.fixture
def far(session, url):
    """The same weights twice: `tiny` is answered here, `far` by the other server."""
    register_tiny(session)
    model = register_tiny(session, "far")
    external_servers.register(model, url, "served-base")
    session.commit()
    return model


def said(client, model, **more):
    answer = client.chat.completions.create(model=model, messages=ASK, max_tokens=24, **{"seed": 5} | more).model_dump()
    for key in ("id", "created", "model", "luthier", "system_fingerprint"):
        answer.pop(key, None)
    answer["usage"].pop("prompt_tokens_details")
    for choice in answer["choices"]:  # last digits of the logarithms hang on what else is in the batch
        for token in (choice["logprobs"] or {}).get("content") or []:
            token["logprob"] = round(token["logprob"], 3)
            token["top_logprobs"] = sorted((t["token"], round(t["logprob"], 3)) for t in token["top_logprobs"])
    return answer


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [{"temperature": 0}, {"temperature": 1.1, "n": 2, "stop": ["e"]}, {"temperature": 0, "logprobs": True, "top_logprobs": 3}]
)
def test_the_answer_is_the_same_wherever_it_is_given(openai_client, generate_worker, far, outside, more):  # noqa: F811
    before = len(state(outside)["asked"])
    here, there = said(openai_client, "tiny", **more), said(openai_client, "far", **more)
    assert len(state(outside)["asked"]) == before + 1
    assert here == there
    assert there["usage"]["completion_tokens"] > 0 and there["usage"]["prompt_tokens"] > 10


@pytest.mark.long
def test_it_streams_with_usage_and_in_parts(openai_client, generate_worker, far, session):  # noqa: F811
    texts = []
    for model in ("tiny", "far"):
        chunks = list(
            openai_client.chat.completions.create(
                model=model, messages=ASK, max_tokens=24, temperature=0, stream=True, stream_options={"include_usage": True}
            )
        )
        assert len(chunks) > 5 and chunks[0].choices[0].delta.role == "assistant"
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] in ("stop", "length")
        assert chunks[-1].usage.completion_tokens > 1 and chunks[-1].choices == []
        texts.append("".join(c.choices[0].delta.content or "" for c in chunks if c.choices))
    assert texts[0] == texts[1]
    wait_until(lambda: session.rollback() or len(session.scalars(select(Answer)).all()) == 2, what="the answers", seconds=10)
    rows = {a.model_name: a for a in session.scalars(select(Answer))}
    assert rows["far"].rendered_prompt == rows["tiny"].rendered_prompt and "<|im_start|>user" in rows["far"].rendered_prompt
    assert "through 127.0.0.1" in playground.proof(rows["far"]) and "through" not in playground.proof(rows["tiny"])
    raw = openai_client.completions.create(model="far", prompt="The bridge", max_tokens=6, temperature=0, logprobs=2, echo=True)
    assert raw.choices[0].text.startswith("The bridge") and len(raw.choices[0].logprobs.tokens) >= 1
    assert raw.model_dump()["luthier"]["engine"].endswith("/v1")


def test_what_the_server_refuses_is_told_as_its_own_words(openai_client, generate_worker, far, outside, monkeypatch):  # noqa: F811
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:  # our context limit is the same, so it is refused before it is sent
            openai_client.chat.completions.create(model="far", messages=[{"role": "user", "content": "wood " * 3000}], stream=stream)
        assert caught.value.code == "context_length_exceeded"
    allow(monkeypatch, f"http://:wrong@127.0.0.1:{outside}/v1")
    with pytest.raises(openai.APIStatusError) as caught:
        openai_client.chat.completions.create(model="far", messages=ASK)
    assert caught.value.status_code == 503 and caught.value.code == "engine_key" and "wrong" not in str(caught.value)


def test_who_leaves_stops_it(openai_client, generate_worker, far, outside):  # noqa: F811
    stream = openai_client.chat.completions.create(model="far", messages=ASK, stream=True, max_tokens=400, logit_bias={"70": 100})
    next(chunk for chunk in stream if chunk.choices and chunk.choices[0].delta.content)
    assert state(outside)["active"] == 1
    stream.close()
    wait_until(lambda: state(outside)["active"] == 0, what="the end of the answer", seconds=10)


def test_an_adapter_is_loaded_there_once(openai_client, generate_worker, far, outside, session, answering_dir, tiny_model, data_dir, user):  # noqa: F811
    from tests.worker.inference.test_engine import make_adapter

    laid = make_adapter(answering_dir / "runs" / "one", tiny_model, 1)
    shutil.copytree(answering_dir / "runs" / "one", data_dir / "runs" / "one")
    more = {"adapter": True, "strategy": "lora", "adapter_sha256": laid.sha256}
    for name, base in (("tuned-here", "tiny"), ("tuned-far", "far")):
        register_tiny(session, name, path="runs/one", base_id=models.get(session, user, base).id, **more)
    before = state(outside)["loads"]
    here, there = said(openai_client, "tuned-here", temperature=0), said(openai_client, "tuned-far", temperature=0)
    assert here == there and here != said(openai_client, "far", temperature=0)
    assert said(openai_client, "tuned-far", temperature=0) == there and state(outside)["loads"] == before + 1
    # What a server cannot hold is answered here: a blend, and an adapter that is more than plain LoRA.
    whole = models.resolve(session, user, "tuned-far")
    assert external_servers.engine_of(session, whole).adapter == "runs/one"
    half = (whole.ref.adapters[0].model_copy(update={"blend": 0.5}),)
    assert external_servers.engine_of(session, whole._replace(ref=whole.ref.model_copy(update={"adapters": half}))) is None
    config = data_dir / "runs" / "one" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    external_servers._plain_lora.cache_clear()
    assert external_servers.engine_of(session, models.resolve(session, user, "tuned-far")) is None
    external_servers._plain_lora.cache_clear()


@pytest.mark.long
def test_an_engine_that_answers_with_something_else_is_found_out(
    api,
    generate_worker,  # noqa: F811
    far,
    outside,
    session,
    answering_dir,  # noqa: F811
    tiny_model,
    data_dir,
    user,
    monkeypatch,
    client,
):
    from safetensors.torch import load_file, save_file

    from tests.worker.inference.test_engine import make_adapter

    laid = make_adapter(answering_dir / "runs" / "checked", tiny_model, 6)
    shutil.copytree(answering_dir / "runs" / "checked", data_dir / "runs" / "checked")
    more = {"adapter": True, "strategy": "lora", "adapter_sha256": laid.sha256, "base_id": far.id}
    register_tiny(session, "tuned-far", path="runs/checked", **more)
    good = api.post("/v1/engines/tuned-far/check").json()
    assert good["fault"] is None and good["distance"] < 1e-3 < 0.1 < good["distance_to_base"], good
    # That server lists tokens by their text, so the half characters that this small model prefers are one to it.
    assert good["same_first_token"] >= 3 and good["prompts"] == 6 and good["engine"] == f"127.0.0.1:{outside}"
    assert api.post("/v1/engines/tiny/check").status_code == 400, "there is nothing to compare"

    whole = wire.Fold.body
    monkeypatch.setattr(wire.Fold, "body", lambda self: whole(self) | {"model": "served-base"})  # a server that dropped the adapter
    bad = api.post("/v1/engines/tuned-far/check").json()
    assert bad["fault"]["cause"] == "adapter" and "answers as the base does" in bad["fault"]["message"], bad
    page = client.post(f"/models/model-{models.get(session, user, 'tuned-far').id.hex}/engine/check", follow_redirects=True)
    assert "the adapter is not applied" in page.text

    folder = shutil.copytree(answering_dir / "models" / "tiny", answering_dir / "models" / "other", dirs_exist_ok=True)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value * 1.5 if "mlp" in name else value for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    other = register_tiny(session, "other", path="models/other")
    other.engine = dict(far.engine)
    session.commit()
    found = api.post("/v1/engines/other/check").json()
    assert found["fault"] is None or found["fault"]["cause"] == "weights"
    assert found["distance"] > 0.01 and found["distance_to_base"] is None, found


def test_the_playground_and_the_lab_use_it_too(client, session, user, far, generate_worker, outside):  # noqa: F811
    order = {"models": ["tiny", "far"], "prompt": "Good morning!", "sampling.max_tokens": "12", "sampling.temperature": "0"}
    told = [json.loads(line) for line in client.post("/playground/stream", data=order).text.splitlines()]
    texts = ["".join(t["text"] for t in told if t["type"] == "text" and t["pane"] == pane) for pane in (0, 1)]
    assert texts[0] == texts[1] != ""
    proofs = {t["pane"]: t["proof"] for t in told if t["type"] == "done"}
    assert "through 127.0.0.1" in proofs[1] and "through" not in proofs[0]
    seen = client.get("/playground/next-tokens", params={"models": ["tiny", "far"], "text": "The bridge"})
    assert seen.status_code == 200 and "engine_" not in seen.text  # looked up in the weights that are here


@pytest.mark.long
def test_another_studio_is_an_engine(studio, session, openai_client, monkeypatch):
    """A whole studio of its own process, with its own database, answers conversations for a model of this one."""
    allow(monkeypatch, studio.url.replace("http://", f"http://:{studio.key}@") + "/v1")
    model = register_tiny(session, "borrowed")
    external_servers.register(model, f"{studio.url}/v1", "smollm2-135m-instruct", "chat")
    session.commit()
    ask = [{"role": "user", "content": "What is the capital of France?"}]
    got = openai_client.chat.completions.create(model="borrowed", messages=ask, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2)
    with openai.OpenAI(base_url=f"{studio.url}/v1", api_key=studio.key, max_retries=0, timeout=60) as direct:
        own = direct.chat.completions.create(
            model="smollm2-135m-instruct", messages=ask, max_tokens=24, temperature=0, logprobs=True, top_logprobs=2
        )
    assert "Paris" in got.choices[0].message.content and got.choices[0].message.content == own.choices[0].message.content
    assert got.usage.completion_tokens == own.usage.completion_tokens and got.usage.prompt_tokens == own.usage.prompt_tokens
    assert [x.token for x in got.choices[0].logprobs.content] == [x.token for x in own.choices[0].logprobs.content]
    with pytest.raises(openai.BadRequestError) as caught:
        openai_client.chat.completions.create(model="borrowed", messages=[{"role": "user", "content": "wood " * 9000}])
    assert caught.value.code == "context_length_exceeded" and studio.url.split("//")[1] in caught.value.message


# What is registered, and by whom ---------------------------------------------------------------------------------------


def test_it_is_registered_over_the_api_and_on_the_page(api, client, session, url, outside):
    model = register_tiny(session)
    listed = api.get("/v1/engines").json()["data"]
    assert [(e["url"], "served-base" in e["models"]) for e in listed] == [(url, True)] and KEY not in json.dumps(listed)
    wrong = api.post("/v1/engines", json={"model": "tiny", "url": url, "engine_model": "nobody"})
    assert wrong.status_code == 400 and "served-base" in wrong.json()["error"]["message"]
    done = api.post("/v1/engines", json={"model": "tiny", "url": url, "engine_model": "served-base"})
    assert done.json()["engine"] == {"url": url, "model": "served-base", "via": "tokens"} == api.get("/v1/models/tiny").json()["engine"]
    page = client.get(f"/models/model-{model.id.hex}?tab=settings")
    assert url in page.text and KEY not in page.text
    assert api.delete("/v1/engines/tiny").json()["engine"] is None and api.delete("/v1/engines/tiny").status_code == 409
    form = {"url": url, "engine_model": "served-base", "via": "chat"}
    page = client.post(f"/models/model-{model.id.hex}/engine", data=form)
    assert page.status_code == 200 and "The server renders conversations itself" in page.text
    page = client.post(f"/models/model-{model.id.hex}/engine", data={"url": ""})
    assert "The built-in engine runs" in page.text


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest/meta-data", "http://127.0.0.1:1/v1", "http://0x7f.1/v1", "http://[::ffff:127.0.0.1]/v1", "file:///etc/passwd",
        "gopher://127.0.0.1/", "http://127.0.0.1:{port}@evil.example/v1", "http://127.0.0.1:{port}/v1/../../admin", "//evil.example", "",
        "http://127.0.0.1:{port}/v1?x=1", "http://127.0.0.1:{port}/v1#", "http://localhost:{port}/v1", "HTTP://127.0.0.1:{port}/v1/x",
    ],
)  # fmt: skip
def test_no_address_but_those_listed_is_ever_called(api, session, url, outside, monkeypatch):
    allow(monkeypatch, f"http://127.0.0.1:{outside}/v1")
    register_tiny(session)
    monkeypatch.setattr(wire.addresses, "pinned", lambda *a: pytest.fail("an address was resolved"))
    answer = api.post("/v1/engines", json={"model": "tiny", "url": url.format(port=outside) or "x", "engine_model": "served-base"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "url"


@pytest.mark.parametrize("entry", ["ftp://a/v1", "http:///v1", "127.0.0.1:8000", "http://a:b:c/v1", "http://a/v1?key=1"])
def test_a_setting_that_is_no_address_is_said_so(data_dir, monkeypatch, entry):
    allow(monkeypatch, entry)
    from app.main import create_app

    with pytest.raises(BadField, match="LUTHIER_ENGINES"):
        create_app()  # at the start, and not on a page


def test_link_local_addresses_are_never_called_whatever_a_name_says():
    def answers(*found):
        return lambda *a, **k: [(0, 0, 0, "", (ip, 80)) for ip in found]

    for bad in ("169.254.169.254", "fe80::1", "::ffff:169.254.169.254", "0.0.0.0", "224.0.0.1"):
        with pytest.raises(OSError, match="may be called"):
            wire.addresses.pinned("http://cloud.example/v1/models", answers(bad))
    where, more = wire.addresses.pinned("https://gpu.example:8443/v1/models", answers("169.254.169.254", "10.0.0.5"))
    assert where == "https://10.0.0.5:8443/v1/models" and more["extensions"]["sni_hostname"] == "gpu.example"
    assert more["headers"]["host"] == "gpu.example:8443"


# What a server may do wrong ---------------------------------------------------------------------------------------------


class Wrong(http.server.BaseHTTPRequestHandler):
    """Says whatever its server was told to say, then closes the connection."""

    def do_POST(self):  # the name http.server calls
        self.rfile.read(int(self.headers["content-length"]))
        self.server.paths.append(self.path)
        status, headers, body = self.server.said
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def wrong():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Wrong)
    server.paths = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()


PART = b'data: {"choices": [{"index": 0, "text": "Hm", "finish_reason": null}]}\n\n'


@pytest.mark.parametrize(
    ("status", "headers", "body", "code"),
    [
        (302, {"location": "http://127.0.0.1:1/secret"}, b"", "engine_failed"),
        (500, {}, b"<html>oops</html>", "engine_failed"),
        (404, {}, b'{"error": {"message": "no such model"}}', "engine_failed"),
        (403, {}, b"", "engine_key"),
        (400, {}, b'{"object": "error", "message": "too long", "code": 400}', "400"),
        (200, {}, b"data: {not json}\n\n", "engine_answer"),
        (200, {}, b'data: {"choices": [{"index": 99, "text": "x"}]}\n\n', "engine_answer"),
        (200, {}, b"data: " + b"x" * (5 * 2**20), "engine_answer"),
        (200, {}, PART + b'data: {"error": {"message": "CUDA out of memory", "type": "server_error"}}\n\n', "engine_failed"),
        (200, {"content-length": "100000"}, PART, "engine_unreachable"),
    ],
)  # fmt: skip
def test_a_wrong_answer_ends_in_an_error_of_our_own_form(
    openai_client, generate_worker, session, wrong, monkeypatch, status, headers, body, code  # noqa: F811
):  # fmt: skip
    allow(monkeypatch, f"http://127.0.0.1:{wrong.server_port}/v1")
    wrong.said = (status, headers, body)
    model = register_tiny(session)
    model.engine = {"url": f"http://127.0.0.1:{wrong.server_port}/v1", "model": "x", "via": "tokens"}
    session.commit()
    with pytest.raises(openai.APIError) as caught:
        for _ in openai_client.chat.completions.create(model="tiny", messages=ASK, stream=True):
            pass
    assert caught.value.code == code and f"127.0.0.1:{wrong.server_port}" in caught.value.message
    assert wrong.paths == ["/v1/completions"]  # the redirect was not followed
    register_tiny(session, "own")
    assert openai_client.chat.completions.create(model="own", messages=ASK, max_tokens=2).choices[0].finish_reason


FORM = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}


@pytest.mark.parametrize(("text", "follows"), [('{"a": 1}', True), ("Hm", False), ('{"a": ', False)])
def test_a_server_that_ignores_a_schema_is_found_out(openai_client, generate_worker, session, wrong, monkeypatch, text, follows):  # noqa: F811
    allow(monkeypatch, f"http://127.0.0.1:{wrong.server_port}/v1")
    part = json.dumps({"choices": [{"index": 0, "text": text, "finish_reason": "stop"}]})
    wrong.said = (200, {}, f"data: {part}\n\ndata: [DONE]\n\n".encode())
    model = register_tiny(session)
    model.engine = {"url": f"http://127.0.0.1:{wrong.server_port}/v1", "model": "x", "via": "tokens"}
    session.commit()
    if follows:
        assert openai_client.chat.completions.create(model="tiny", messages=ASK, response_format=FORM).choices[0].message.content == text
        return
    with pytest.raises(openai.APIError, match="did not follow the schema") as caught:
        openai_client.chat.completions.create(model="tiny", messages=ASK, response_format=FORM)
    assert caught.value.code == "engine_failed"


def test_a_server_that_is_away_is_said_to_be_away(session, url, far, monkeypatch):
    port = free_port()
    allow(monkeypatch, f"http://127.0.0.1:{port}/v1")
    with pytest.raises(Unavailable) as caught:
        external_servers.register(far, f"http://127.0.0.1:{port}/v1", "x")
    assert caught.value.code == "engine_unreachable" and "take it away" in caught.value.hint


def test_an_answer_that_takes_too_long_is_cut_off(session, user, far, generate_worker, outside):  # noqa: F811
    import asyncio

    who = playground.speaker(session, user, "far")
    sampling = Sampling(max_tokens=480, temperature=0, logit_bias={70: 100})
    request = playground.request_for(user, who, sampling, messages=ASK).model_copy(update={"seconds": 0.2})

    async def hear():
        return [entry async for entries in inference_client.stream(request) for entry in entries]

    began = time.monotonic()
    heard = asyncio.run(hear())
    assert time.monotonic() - began < 10 and heard[-1].type == "done" and heard[-2].reason == "length"
    assert 0 < heard[-1].completion_tokens < 480
