"""What a stranger can do to the web process before anybody knows who asks: a real uvicorn, real sockets."""

from __future__ import annotations

import os
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest
from starlette.testclient import TestClient

from app.ops.embedded.up import commands
from app.settings import get_settings
from app.web import passwords
from app.web import templates as web_templates
from tests.conftest import ORIGIN, PROJECT, free_port, wait_until


@contextmanager
def web_process(folder: Path, **environment: str) -> Iterator[tuple[int, psutil.Process]]:
    """The web process as `luthier up` starts it, except for the waits: its port and itself."""
    port = free_port()
    command = [part.replace("app.web.http_protocol", "tests.security.quick_protocol") for part in commands(get_settings())["web"]]
    command[command.index("--port") + 1] = str(port)
    log = folder / "web.log"
    with log.open("ab") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", *command], cwd=PROJECT, env=os.environ | environment, stdout=out, stderr=out, preexec_fn=few_descriptors
        )
    try:
        wait_until(lambda: process.poll() is None and answers(port), what="the web process", log=log, seconds=120)
        yield port, psutil.Process(process.pid)
    finally:
        process.kill()
        process.wait()


def few_descriptors() -> None:
    """As from a shell: a low soft limit under a high hard one."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(256, hard), hard))


def answers(port: int) -> bool:
    try:
        return httpx.get(f"http://127.0.0.1:{port}/healthz", timeout=5).status_code == 200
    except httpx.HTTPError:
        return False


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, psutil.Process]]:
    """Neither a database nor a broker is there: nothing at the door asks for one."""
    folder = tmp_path_factory.mktemp("door")
    nowhere = {"LUTHIER_DATABASE_URL": "postgresql+psycopg://nobody@/none?host=/nowhere", "LUTHIER_REDIS_URL": "unix:///nowhere.sock"}
    with web_process(folder, LUTHIER_DATA_DIR=str(folder), **nowhere) as running:
        yield running


def connect(port: int, sent: bytes = b"", address: str = "127.0.0.1") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=10, source_address=(address, 0))
    if sent:
        connection.sendall(sent)
    return connection


def rest(connection: socket.socket) -> bytes:
    """Everything until the other side closes. A reset counts as an end: bytes on the way are not waited for."""
    heard = b""
    try:
        while piece := connection.recv(65536):
            heard += piece
    except ConnectionResetError:
        pass
    return heard


GET = b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\n"


@pytest.mark.parametrize(
    ("begin", "piece"),
    [
        (GET + b"x: ", b"x" * 4096),
        (GET, b"x: y\r\n" * 100),
        (GET, b"".join(b"x-%d: %s\r\n" % (n, b"y" * 4000) for n in range(10))),
        (b"GET /healthz?", b"x" * 4096),
        (b"", b"\r\n" * 2048),
        (b"POST /sign-in HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n0\r\nx: ", b"y" * 4096),
        (b"POST /sign-in HTTP/1.1\r\nhost: 127.0.0.1\r\ntransfer-encoding: chunked\r\n\r\n1;x=", b"y" * 4096),
    ],
    ids=["one header", "many headers", "large headers", "address", "empty lines", "trailer", "chunk extension"],
)
def test_endless_headers_are_refused_and_take_no_memory(door, begin, piece):
    port, process = door
    before = process.memory_info().rss
    sent = 0
    with connect(port, begin) as connection:
        connection.setblocking(True)
        try:
            while sent < 20_000_000:
                connection.sendall(piece)
                sent += len(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
    assert sent < 8_000_000, "more than the buffers of the two kernels was taken"
    assert process.memory_info().rss - before < 8_000_000
    assert answers(port)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (GET + b"x: " + b"y" * 66_000 + b"\r\n\r\n", 431),
        (GET + b"x: y\r\n" * 130 + b"\r\n", 431),
        (GET + b"x: " + b"y" * 60_000 + b"\r\n\r\n", 200),
        (GET + b"x: y\r\n" * 100 + b"\r\n", 200),
        (GET + b"host: 127.0.0.1\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nhost: evil.example\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\n\r\n", 400),
        (b"nonsense\r\n\r\n", 400),
        (GET + b"upgrade: websocket\r\nconnection: upgrade\r\nsec-websocket-version: 13\r\nsec-websocket-key: eHh4\r\n\r\n", 200),
    ],
    ids=["66 kB", "130 headers", "60 kB", "100 headers", "one host twice", "two hosts", "no host", "nonsense", "websocket"],
)
def test_limits_on_headers(door, request_, status):
    with connect(door[0], request_.replace(b"host: 127.0.0.1\r\n", b"host: 127.0.0.1\r\nconnection: close\r\n", 1)) as connection:
        assert re.match(rb"HTTP/1.1 (\d+)", rest(connection))[1] == str(status).encode()


def test_a_request_whose_headers_never_come_is_ended(door):
    """Silent from the start, in the middle of a line, a byte now and then, and silent after an answer."""
    port, _ = door
    begun = time.monotonic()
    with ExitStack() as stack:
        waiting = [stack.enter_context(connect(port, sent)) for sent in (b"", GET[:30], GET, GET + b"\r\n" + GET[:30])]
        dripping = stack.enter_context(connect(port, GET))
        for _ in range(4):
            time.sleep(0.3)
            dripping.sendall(b"x")
        heard = [rest(connection) for connection in (*waiting, dripping)]
    assert 1.2 < time.monotonic() - begun < 8
    assert all(b"HTTP/1.1 408" in text for text in heard), heard


@pytest.mark.long
def test_a_body_that_does_not_come_is_ended_and_a_slow_one_is_waited_for(door):
    """The slow one takes several times as long as the wait; it is answered 403 or 503, after all of it was read."""
    port, _ = door
    head = b"POST /sign-in HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/x-www-form-urlencoded\r\nconnection: close\r\ncontent-length: "
    with connect(port, head + b"2000\r\n\r\nname=x") as stuck, connect(port, head + b"1506\r\n\r\nname=x") as slow:
        for _ in range(15):
            time.sleep(0.25)
            slow.sendall(b"y" * 100)
        assert rest(stuck).startswith(b"HTTP/1.1 408")
        assert re.match(rb"HTTP/1.1 (403|503)", rest(slow))


def test_a_client_that_does_not_read_its_answer_is_given_up(door):
    port, process = door
    largest = max((path for path in web_templates.STATIC.rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect(("127.0.0.1", port))
        mine = connection.getsockname()[1]
        connection.sendall(
            f"GET {web_templates.static(largest.relative_to(web_templates.STATIC).as_posix())} HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n".encode()
            * 10
        )
        time.sleep(0.5)
        held = lambda: mine in [one.raddr.port for one in process.net_connections("tcp") if one.raddr]  # noqa: E731
        assert held()
        wait_until(lambda: not held(), what="the end of the connection", seconds=10)


def test_a_kept_connection_serves_many_requests(door):
    port, _ = door
    with connect(port) as connection:
        for pause in (0, 0.5, 1.0):
            time.sleep(pause)
            connection.sendall(GET + b"\r\n")
            heard = b""
            while not heard.endswith(b"}"):
                heard += connection.recv(65536)
            assert heard.startswith(b"HTTP/1.1 200")
        connection.sendall((GET + b"\r\n") * 10)
        heard = b""
        while heard.count(b'{"status":"ok"}') < 10:
            heard += connection.recv(65536)
        connection.sendall((GET + b"\r\n") * 100)
        assert rest(connection).count(b'{"status":"ok"}') < 20, "a longer pipeline is not taken"


def test_many_slow_connections_leave_the_others_alone(door):
    """Half a request line on each; the descriptors of the shell would not be enough for them."""
    port, _ = door
    with ExitStack() as stack:
        slow = [stack.enter_context(connect(port, GET[:10])) for _ in range(400)]
        taken = []
        for _ in range(40):
            begun = time.monotonic()
            assert answers(port)
            taken.append(time.monotonic() - begun)
        assert sorted(taken)[-2] < 1.0
        for connection in slow:
            assert rest(connection).startswith(b"HTTP/1.1 408")


@pytest.mark.long
def test_connections_are_counted_by_address_and_together(tmp_path):
    folder = {"LUTHIER_DATA_DIR": str(tmp_path), "LUTHIER_MAX_CONNECTIONS": "40", "LUTHIER_MAX_CONNECTIONS_PER_ADDRESS": "10"}
    nowhere = {"LUTHIER_DATABASE_URL": "postgresql+psycopg://nobody@/none?host=/nowhere", "LUTHIER_REDIS_URL": "unix:///nowhere.sock"}
    with web_process(tmp_path, **folder, **nowhere) as (port, _), ExitStack() as stack:
        held = [stack.enter_context(connect(port, GET)) for _ in range(30)]
        time.sleep(0.3)
        with connect(port) as refused:
            assert rest(refused).startswith(b"HTTP/1.1 503"), "this machine may hold all but ten of them"
        others = [stack.enter_context(connect(port, GET, address=f"127.0.0.{n}")) for n in range(2, 12)]
        with connect(port, GET + b"\r\n", address="127.0.0.50") as refused:
            assert rest(refused).startswith(b"HTTP/1.1 503"), "all of them are held"
        for connection in (*held, *others):
            connection.close()
        wait_until(lambda: answers(port), what="room", seconds=10)


@pytest.mark.long
def test_what_a_stranger_says_of_his_own_address_is_not_believed(tmp_path, session, user, valkey):
    """Wrong passwords, each with another made-up address, as a local process or one behind a careless proxy sends them."""
    with web_process(tmp_path) as (port, _):
        origin = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=origin, headers={"origin": origin}) as asker:
            found = [wrong_password(asker, f"203.0.113.{n}") for n in range(8)]
    assert found == [401] * 5 + [429] * 3


def wrong_password(asker: httpx.Client, address: str) -> int:
    return asker.post("/sign-in", data={"name": "owner", "password": "x"}, headers={"x-forwarded-for": address}).status_code


@pytest.mark.long
def test_a_named_proxy_is_believed(session, user, monkeypatch):
    from app.main import create_app

    monkeypatch.setenv("LUTHIER_FORWARDED_ALLOW_IPS", "10.0.0.1, 10.1.0.0/16")
    get_settings.cache_clear()
    app = create_app()
    for proxy, judged in (("10.0.0.1", 7), ("10.1.2.3", 7), ("10.2.0.1", 5)):
        asker = TestClient(app, base_url=ORIGIN, headers={"origin": ORIGIN}, client=(proxy, 4000))
        assert [wrong_password(asker, f"203.0.{judged}.{proxy[-1]}{n}") for n in range(7)].count(401) == judged


def test_passwords_that_are_being_judged_hold_up_no_page(web: TestClient, session, user, monkeypatch):
    """More of them than there are threads for pages."""
    judging, go_on = threading.Event(), threading.Event()

    def slow(*_: object) -> bool:
        judging.set()
        return not go_on.wait(30)

    monkeypatch.setattr(passwords, "matches", slow)

    def guess(n: int) -> None:
        asker = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN}, client=(f"10.7.0.{n}", 4000))
        asker.portal = web.portal
        statuses.append(asker.post("/sign-in", data={"name": f"name {n}", "password": "x"}).status_code)

    statuses: list[int] = []
    threads = [threading.Thread(target=guess, args=(n,), daemon=True) for n in range(50)]
    try:
        for thread in threads:
            thread.start()
        assert judging.wait(20)
        wait_until(lambda: len(statuses) == 50 - passwords.AT_ONCE - passwords.MAX_WAITING, what="those sent away", seconds=20)
        begun = time.monotonic()
        assert web.get("/sign-in").status_code == 200
        assert time.monotonic() - begun < 5
    finally:
        go_on.set()
        for thread in threads:
            thread.join(30)
    assert sorted(statuses) == [401] * 18 + [429] * 32
