"""What the tests stand on: a real PostgreSQL, a real Valkey, a real small model, a real studio, a real browser.

Each test has a database, a data folder and an empty Valkey of its own. The servers are started once per run.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as trainers have it: threads that spin take the cores of the other tests
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # hundreds of processes read the same modules
sys.dont_write_bytecode = False  # nor need pytest rewrite every test anew in each process of each run
for name in [name for name in os.environ if name.startswith("LUTHIER_")]:
    del os.environ[name]  # a studio of the person who runs the tests must stay out of them

import pytest  # noqa: E402
from sqlalchemy import Engine, NullPool, create_engine, text  # noqa: E402
from sqlalchemy.exc import SQLAlchemyError  # noqa: E402
from sqlalchemy.orm import Session  # noqa: E402

PROJECT = Path(__file__).resolve().parent.parent
os.environ.setdefault("NUMBA_CACHE_DIR", str(PROJECT / ".pytest_cache" / "numba"))  # compiled once, not for every data folder
ORIGIN = "http://127.0.0.1:8000"


# Servers ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def servers_dir() -> Iterator[Path]:
    """A folder with a short path, because the path of a unix socket has at most 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-"))
    folder.chmod(0o711)  # the database's user must be able to pass through it
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Server:
    """A running server: its address, and its process for tests that kill it."""

    url: str
    process: subprocess.Popen


@dataclass
class PostgresServer(Server):
    """`template` is a database with the newest schema and nothing in it; `url_of(name)` addresses another."""

    url_of: object
    template: str = "template_luthier"


@pytest.fixture(scope="session")
def postgres(servers_dir: Path) -> Iterator[PostgresServer]:
    from app.migrate import upgrade
    from app.ops.embedded.postgres import Postgres

    database = Postgres(servers_dir, fast=True)
    database.prepare()
    with (servers_dir / "postgres.log").open("wb") as log:
        process = subprocess.Popen(database.command(), stdout=log, stderr=log, cwd="/")
    try:
        admin = create_engine(database.url_of("postgres"), poolclass=NullPool, isolation_level="AUTOCOMMIT")
        wait_until(lambda: can_connect(admin), what="PostgreSQL", log=servers_dir / "postgres.log")
        with admin.connect() as connection:
            connection.execute(text("CREATE DATABASE template_luthier"))
            connection.execute(text("ALTER SYSTEM SET autovacuum = off"))  # the room of deleted rows stays unused, see `empty`
            connection.execute(text("SELECT pg_reload_conf()"))
        upgrade(database.url_of("template_luthier"))
        yield PostgresServer(database.url_of("postgres"), process, database.url_of)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(20)


@pytest.fixture(scope="session")
def valkey(servers_dir: Path) -> Iterator[Server]:
    from app.ops.embedded.valkey import Valkey

    server = Valkey(servers_dir)
    with (servers_dir / "valkey.log").open("wb") as log:
        process = subprocess.Popen(server.command(), stdout=log, stderr=log, cwd="/")
    try:
        wait_until(lambda: answers(server.url), what="Valkey", log=servers_dir / "valkey.log")
        yield Server(server.url, process)
    finally:
        process.terminate()
        process.wait(10)


def wait_until(condition, *, what: str, log: Path | None = None, seconds: float = 20.0) -> None:
    """Poll until `condition()` is true; fail with the end of the log when it never is."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return
        time.sleep(0.02)
    said = log.read_text(errors="replace")[-3000:] if log and log.exists() else ""
    pytest.fail(f"{what} was not there after {seconds} s. {said}")


def can_connect(engine) -> bool:
    from sqlalchemy.exc import OperationalError

    try:
        with engine.connect():
            return True
    except OperationalError:
        return False


def answers(url: str) -> bool:
    """Whether Valkey does. Its socket is there a moment before anybody is let in."""
    import redis

    try:
        return redis.Redis.from_url(url).ping()
    except redis.ConnectionError:
        return False


# One studio's state, in this process ----------------------------------------------------------------------------------


def forget_settings() -> None:
    """Everything this process remembers of its environment is read anew."""
    from app import db, queue, settings

    for cached in (db.get_engine, queue.get_redis):
        if cached.cache_info().currsize:
            old = cached()
            old.dispose() if hasattr(old, "dispose") else old.close()
        cached.cache_clear()
    settings.get_settings.cache_clear()
    if "app.web.auth" in sys.modules:
        sys.modules["app.web.auth"].secret.cache_clear()


@pytest.fixture(autouse=True)
def answers_are_documented() -> Iterator[None]:
    """Whatever the API has answered in a test is as its document says."""
    yield
    documented = sys.modules.get("tests.documented")
    if documented is not None and documented.violations:
        found = list(documented.violations)
        documented.violations.clear()
        pytest.fail("not as the API's document says:\n" + "\n".join(found), pytrace=False)


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty data folder of this test's own; `LUTHIER_DATA_DIR` points at it. Applications are only made beside one."""
    from tests import documented

    documented.install()
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("LUTHIER_DATA_DIR", str(folder))
    monkeypatch.setenv("LUTHIER_OFFLINE", "true")
    forget_settings()
    yield folder
    forget_settings()


@pytest.fixture
def session(postgres: PostgresServer, valkey: Server, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Session]:
    """A session on a fresh database. Commit what another session or a client must see."""
    import redis

    from app import queue
    from app.db import get_engine

    admin = create_engine(postgres.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    usual = postgres.template == PostgresServer.template  # one made from something else is no other test's
    name, used = _emptied.pop() if _emptied and usual else (new_database(admin, postgres.template), 0)
    redis.Redis.from_url(valkey.url).flushall()
    monkeypatch.setenv("LUTHIER_DATABASE_URL", postgres.url_of(name))
    monkeypatch.setenv("LUTHIER_REDIS_URL", valkey.url)
    forget_settings()
    queue.celery.conf.broker_url = queue.broker_url(valkey.url)
    with Session(get_engine(), expire_on_commit=False) as opened:
        yield opened
    forget_settings()
    if usual and used < MAX_USES and empty(postgres.url_of(name)):
        _emptied.append((name, used + 1))
    else:
        with admin.connect() as connection:
            connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


_emptied: list[tuple[str, int]] = []
"""Databases that tests have left, whose rows were deleted, and how often each was used. To make one takes ten times as long."""
MAX_USES = 50
"""The room of deleted rows is never used again, so that the rows of a table stand in the order in which a test wrote them."""


def new_database(admin: Engine, template: str) -> str:
    name = f"test_{uuid.uuid4().hex[:12]}"
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name} TEMPLATE {template} STRATEGY FILE_COPY"))  # half the work of WAL_LOG
    return name


def empty(url: str) -> bool:
    """Delete every row of a database; False where somebody else still uses it, or where it is no longer as it was made."""
    from app.tables import Base

    tables = set(Base.metadata.tables)
    engine = create_engine(url, poolclass=NullPool)
    try:
        with engine.begin() as connection:
            others = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()")
            late = time.monotonic() + 0.5  # what was hung up on leaves a moment later
            while connection.scalar(others):
                if time.monotonic() > late:
                    return False
                time.sleep(0.005)
                connection.execute(text("SELECT pg_stat_clear_snapshot()"))
            found = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'"))
            if set(found) != {*tables, "alembic_version"}:
                return False
            said = [
                "SET LOCAL session_replication_role = replica",
                "SET LOCAL lock_timeout = '1s'",
                *(f'DELETE FROM "{table}"' for table in tables),
            ]
            said.append("SELECT setval(quote_ident(sequencename), start_value, false) FROM pg_sequences WHERE schemaname = 'public'")
            connection.execute(text("; ".join(said)))
        return True
    except SQLAlchemyError:
        return False


@pytest.fixture
def user(session: Session):
    """The person who owns what a test makes: the first account, committed."""
    from app.web import auth

    found = auth.first_user(session)
    session.commit()
    return found


_applications: dict[tuple[str | None, ...], Any] = {}


@contextlib.contextmanager
def application() -> Iterator[Any]:
    """The web application of this process.

    What each of its routes takes is worked out at the first request, which costs an application half a second of a core. So one
    serves test after test, as one serves request after request, unless a test has added a route to it.
    """
    from app.db import answer_people
    from app.kit import logs
    from app.main import create_app
    from app.settings import get_settings

    settings = get_settings()
    read = (settings.public_url, settings.trusted_hosts, settings.forwarded_allow_ips)  # once, by its layers
    app = _applications.pop(read, None) or create_app()
    logs.configure()  # to this test's standard error
    answer_people()
    routes = len(app.routes)
    yield app
    if len(app.routes) == routes:
        _applications[read] = app


@pytest.fixture
def web(session: Session) -> Iterator:
    """The web application, started. `client` and `api` are two ways into it."""
    from starlette.testclient import TestClient

    with application() as app, TestClient(app, base_url=ORIGIN) as started:
        yield started


@pytest.fixture
def served(session: Session) -> Iterator[str]:
    """The address of the web application on a port of its own, in this process, so that it has this test's database."""
    import uvicorn

    port = free_port()
    with application() as app:
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_config=None, ws="none", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        wait_until(lambda: server.started or not thread.is_alive(), what="the web application")
        yield f"http://127.0.0.1:{port}"
        server.should_exit = True
        thread.join(30)
        assert not thread.is_alive(), "it does not leave"


@pytest.fixture
def client(web, session: Session, user) -> Iterator:
    """A browser without its screen: signed in by the link, with the cookie, the origin and the CSRF token."""
    from starlette.testclient import TestClient

    from app.web import auth

    link = auth.new_sign_in_link(session, user)
    session.commit()
    browser = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN})
    page = browser.get(link)
    assert page.status_code == 200, page.text[:2000]
    browser.headers["x-csrf-token"] = csrf_token(page.text)
    yield browser


def csrf_token(html: str) -> str:
    found = re.search(r'<meta\s+name="csrf-token"\s+content="([^"]+)"', html)
    assert found, "the page carries no csrf-token"
    return found.group(1)


@pytest.fixture
def api(web, session: Session, user) -> Iterator:
    """An httpx client with an API key."""
    from starlette.testclient import TestClient

    from app.web import auth

    _, key = auth.create_key(session, user, "tests")
    session.commit()
    program = TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {key}"})
    program.key = key
    yield program


@pytest.fixture
def openai_client(api, served: str) -> Iterator:
    """OpenAI's own client with the key of `api`, of whatever version is installed (`make test-clients`), over a real connection."""
    import openai

    with openai.OpenAI(base_url=f"{served}/v1", api_key=api.key, max_retries=0, timeout=60) as client:
        yield client


# Models ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the small model. Read it, never write to it."""
    from tests.tiny import build_model

    return build_model(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def tiny_registered(session: Session, data_dir: Path, tiny_model: Path):
    """The small model as a base everyone can use, under the name `tiny`, committed."""
    from app.kit import manifest
    from app.models import import_checks
    from app.shapes import shape_of
    from app.tables import Model

    key = uuid.uuid4()
    folder = data_dir / "models" / str(key)
    shutil.copytree(tiny_model, folder)
    shape = shape_of(json.loads((folder / "config.json").read_text())).model_dump()
    source = {"from": "folder", "path": str(tiny_model)}
    made = manifest.write(folder, source=source, license="apache-2.0", kind="dialogue", shape=shape, rules=import_checks.RULES)
    model = Model(
        id=key,
        name="tiny",
        title="Tiny",
        kind="dialogue",
        path=folder.relative_to(data_dir).as_posix(),
        revision=made["revision"],
        source=source,
        license="apache-2.0",
        shape=shape,
        bytes=made["bytes"],
    )
    session.add(model)
    session.commit()
    return model


STARTER = "smollm2-135m-instruct"


@pytest.fixture(scope="session")
def starter_model() -> Path:
    """The folder of the starter model, made once per checkout; skips only where its wheel cannot be had."""
    from app.errors import StudioError
    from app.models import starters

    kept = PROJECT / ".data" / "tests"
    kept.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("LUTHIER_DATA_DIR")
    os.environ["LUTHIER_DATA_DIR"] = str(kept)
    forget_settings()
    try:
        return Path(starters.ensure(STARTER))
    except StudioError as error:
        pytest.skip(f"the starter model cannot be had: {error}")
    finally:
        os.environ.pop("LUTHIER_DATA_DIR")
        if before is not None:
            os.environ["LUTHIER_DATA_DIR"] = before
        forget_settings()


# The whole studio -----------------------------------------------------------------------------------------------------


@dataclass
class Studio:
    """A running `luthier up`: where it answers, how to sign in, and its folder."""

    url: str
    link: str
    data_dir: Path
    process: subprocess.Popen
    log: Path
    key: str = ""

    def luthier(self, *arguments: str, **options) -> subprocess.CompletedProcess:
        """A `luthier` command beside it."""
        return subprocess.run(
            [sys.executable, "-m", "app.cli", *arguments],
            cwd=PROJECT,
            env=studio_environment(self.data_dir),
            capture_output=True,
            text=True,
            timeout=120,
            **options,
        )

    def stop(self, seconds: float = 60.0) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(seconds)


def studio_environment(data_dir: Path, **more: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("LUTHIER_")}
    return kept | {"LUTHIER_DATA_DIR": str(data_dir), "LUTHIER_OFFLINE": "true", "PYTHONUNBUFFERED": "1", "NO_COLOR": "1"} | more


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_studio(data_dir: Path, *, seconds: float = 90.0, prefix: tuple[str, ...] = (), **more: str) -> Studio:
    """`luthier up` on a free port, waited for until it has printed its sign-in link."""
    port = free_port()
    log = Path(tempfile.mkdtemp(prefix="luthier-log-")) / "up.log"
    command = [*prefix, sys.executable, "-m", "app.cli", "up", "--port", str(port), "--data-dir", str(data_dir)]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=studio_environment(data_dir, **more),
            stdout=out,
            stderr=out,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and process.poll() is None:
        found = re.search(rf"http://127\.0\.0\.1:{port}/\S+", log.read_text(errors="replace"))
        if found:
            return Studio(f"http://127.0.0.1:{port}", found.group(0), data_dir, process, log)
        time.sleep(0.05)
    if process.poll() is None:
        process.terminate()
    raise AssertionError(f"the studio printed no sign-in link in {seconds} s:\n{log.read_text(errors='replace')[-6000:]}")


@pytest.fixture(scope="session")
def studio(starter_model: Path) -> Iterator[Studio]:
    """One whole studio with the starter model for all tests that ask for it, and an API key in `studio.key`."""
    folder = Path(tempfile.mkdtemp(prefix="luthier-studio-"))
    folder.chmod(0o711)
    shutil.copytree(starter_model, folder / "models" / starter_model.name)
    running = start_studio(folder)
    try:
        made = running.luthier("keys", "create", "tests")
        assert made.returncode == 0, made.stderr
        running.key = made.stdout.strip()
        yield running
    finally:
        running.stop()
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Chromium: Debian's where it is installed, else the one Playwright brought. One per file, because Playwright keeps an
    event loop running in this thread while it is open, beside which no other test could start one."""
    from playwright.sync_api import sync_playwright

    system = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=system, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield started
        started.close()


@pytest.fixture
def browser_page(browser) -> Iterator:
    """A page in a fresh context. An error in a script of the page fails the test."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert not errors, f"scripts of the page failed: {errors}"


# The order of a run, and what is said after it ------------------------------------------------------------------------


def pytest_collection(session: pytest.Session) -> None:
    gc.disable()  # what is imported now stays: looking for garbage in it takes a third of the time


def pytest_collection_finish(session: pytest.Session) -> None:
    gc.freeze()
    gc.enable()


MANY_MODULES = 100
_modules_frozen = 0


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """What the code imports when it first needs it stays as well. Each job trained here looks for garbage several times."""
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + MANY_MODULES:
        gc.collect()
        gc.freeze()
        _modules_frozen = len(sys.modules)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take long first: those that run the whole studio or the starter model, then those with a browser or with more time
    allowed than usual, then those with many tests. Two processes share the files, and whichever has a long one last is waited for
    by the other."""
    rank: dict[Path, int] = {}
    for item in items:
        marks = {mark.name for mark in item.iter_markers()}
        own = 0 if marks & {"studio", "starter"} else 1 if marks & {"browser", "timeout"} else 2
        rank[item.path] = min(own, rank.get(item.path, own))
        for mark in item.iter_markers("flaky"):
            item.user_properties.append(("flaky", mark.kwargs["reason"]))
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: (rank[item.path], -tests[item.path], str(item.path)))


_BEGAN = pytest.StashKey[tuple[float, float]]()


def seconds_so_far() -> tuple[float, float]:
    """Of all cores, by this process and by its children that ended; and by the clock."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system, time.monotonic()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    item.stash[_BEGAN] = seconds_so_far()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> None:
    if call.when == "teardown":
        item.user_properties.append(("seconds", [now - then for now, then in zip(seconds_so_far(), item.stash[_BEGAN], strict=True)]))


def where_the_time_went(terminalreporter: pytest.TerminalReporter, most: int = 15) -> None:
    """The files that took most of the processor, so that one that grows is seen."""
    files: dict[str, list[float]] = {}
    for report in terminalreporter.stats.get("", []):
        for cpu, wall in (said for name, said in report.user_properties if name == "seconds" and report.when == "teardown"):
            found = files.setdefault(report.nodeid.partition("::")[0], [0.0, 0.0, 0])
            found[:] = [found[0] + cpu, found[1] + wall, found[2] + 1]
    if len(files) < 2:
        return
    terminalreporter.section("where the time went")
    all_ = [sum(column) for column in zip(*files.values(), strict=True)]
    for name, (cpu, wall, tests) in [("all files", all_), *sorted(files.items(), key=lambda item: -item[1][0])[:most]]:
        terminalreporter.write_line(f"{cpu:8.1f} s of CPU {wall:8.1f} s by the clock {tests:5.0f} tests  {name}")


def passed_on_the_second_try(terminalreporter: pytest.TerminalReporter) -> None:
    """After the second try of `make test`: what is known to fail beside others, and what is not and must be mended or marked."""
    if not terminalreporter.config.getoption("lf", False):
        return
    for report in terminalreporter.stats.get("passed", []):
        reason = dict(report.user_properties).get("flaky")
        said = f"known, {reason}" if reason else "NOT KNOWN: mend it, or mark it `flaky` with the reason"
        terminalreporter.write_line(f"{report.nodeid} failed beside others and passed alone ({said})")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The figures of the main job, where the time went, and what only passed alone. A test's report brings them from whichever process it
    ran in; what it prints is lost there. How many answers were checked against the API's document is known where all tests ran here."""
    documented = sys.modules.get("tests.documented")
    if documented is not None and documented.checked:
        kinds = documented.checked
        terminalreporter.write_line(f"{kinds.total():,} answers under /v1 are as documented, of {len(kinds)} operations and statuses.")
    for outcome in ("passed", "failed"):
        for report in terminalreporter.stats.get(outcome, []):
            for name, said in report.user_properties:
                if name.startswith("main job"):
                    terminalreporter.section(name)
                    terminalreporter.write_line(said)
    where_the_time_went(terminalreporter)
    passed_on_the_second_try(terminalreporter)
