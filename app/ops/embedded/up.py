"""`luthier up`, from top to bottom; and the database alone, for commands with or without a running studio."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from app.errors import BadField, Forbidden, Unavailable
from app.kit.addresses import is_loopback
from app.kit.child_process import launched
from app.machines.gpus import visible_gpus
from app.ops.embedded import sweep
from app.ops.embedded.places import Lock, make_data_dir, private_folder
from app.ops.embedded.postgres import DATABASE, Postgres
from app.ops.embedded.supervisor import ServiceProcess, Supervisor
from app.ops.embedded.valkey import Valkey
from app.settings import Settings, get_settings
from app.storage import objects

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.tables import User

SERVERS = ["valkey", "postgres"]


def up(say: Callable[[str], None]) -> None:
    """Start everything, print the sign-in link, supervise until Ctrl-C, and stop it in order."""
    settings = get_settings()
    refuse_open_address(settings)
    objects.check()
    make_data_dir(settings.data_dir)
    lock = Lock(settings.data_dir)
    lock.take()
    try:
        refuse_taken_port(settings)
        if left := sweep.clear(settings.data_dir):
            say(f"{len(left)} processes of a studio that was killed here before were stopped.")
        run_studio(settings, lock, say)
    finally:
        lock.release()


def run_studio(settings: Settings, lock: Lock, say: Callable[[str], None]) -> None:
    run = secrets.token_hex(8)
    os.environ |= {sweep.MARK: sweep.mark(settings.data_dir, run), "LUTHIER_DATA_DIR": str(settings.data_dir)}
    supervisor = Supervisor(private_folder(settings.data_dir / "logs"), say)
    supervisor.catch_signals()
    try:
        supervisor.start(warden(settings.data_dir, run))
        start_servers(supervisor, settings)
        if not settings.database_url:  # workers of other machines may hold leases in another database
            free_what_was_held()
        web, *others = processes(settings)
        supervisor.start(web)
        url = studio_url(settings)
        lock.tell(url=url, external=bool(settings.database_url))
        path = welcome()
        supervisor.wait_for(lambda: answers(settings), what=web, seconds=120)
        for child in others:  # only now, so that they do not take CPU time from the page a person waits for
            supervisor.start(child)
        say(f"Luthier is ready. Sign in (once, within an hour):\n\n    {url}{path}\n\nCtrl-C stops it. Logs: {supervisor.logs}")
        supervisor.run()
    except KeyboardInterrupt:
        pass
    finally:
        supervisor.stopping = max(1, supervisor.stopping)
        stop(supervisor, say)
        sweep.end(sweep.marked(settings.data_dir, run))


def stop(supervisor: Supervisor, say: Callable[[str], None]) -> None:
    """Workers first, while everything they need to save their work is running; the database last."""
    names = [child.name for child in supervisor.children]
    workers = [name for name in names if name.startswith(("train", "evaluate", "data", "import", "generate", "export"))]
    if any(child.process for child in supervisor.children if child.name.startswith("train")):
        say("Stopping. A job that runs saves where it is and goes on at the next start; Ctrl-C again does not wait for it.")
    supervisor.stop(workers)
    supervisor.stop(["web", "relay"])
    supervisor.stop(["valkey"])
    supervisor.stop(["postgres"])
    supervisor.stop(["warden"])


# What runs -------------------------------------------------------------------------------------------------------------


def commands(settings: Settings) -> dict[str, list[str]]:
    """Our own processes by name, as a person would type them. docker-compose.yml starts the same; a test compares them."""
    celery = ["celery", "-A", "worker.main", "worker", "--loglevel", "INFO", "--without-gossip", "--without-mingle", "--without-heartbeat"]
    web = ["uvicorn", "app.main:create_app", "--factory", "--host", settings.host, "--port", str(settings.port)]
    # The application trusts forwarded headers of the proxies in the settings; uvicorn would trust all of this machine.
    web += ["--http", "app.web.http_protocol:Guarded", "--no-proxy-headers"]
    return {
        "web": [*web, "--no-access-log", "--timeout-graceful-shutdown", "5"],  # an access log would contain sign-in links
        "relay": ["app.relay"],
        "generate": [*celery, "-Q", "generate", "--pool=threads", "-c", "64", "-n", "generate@%h"],
        "data": [*celery, "-Q", "data", "--pool=threads", "-c", "2", "-n", "data@%h"],
        "import": [*celery, "-Q", "import", "--pool=threads", "-c", "2", "-n", "import@%h"],
        "export": [*celery, "-Q", "export", "--pool=threads", "-c", "1", "-n", "export@%h"],
        "evaluate": [*celery, "-Q", "evaluate", "--pool=threads", "-c", "1", "-n", "evaluate@%h"],
        "train": [*celery, "-Q", "train,evaluate", "--pool=prefork", "-c", "1", "-n", "train@%h"],
    }


def processes(settings: Settings) -> list[ServiceProcess]:
    """The children that run our own code; as many train workers as jobs have GPUs at once."""
    children = []
    for name, arguments in commands(settings).items():
        command = launched([sys.executable, "-m", *arguments])
        if name == "train":
            children += [train_worker(command, number, settings) for number in range(1, train_workers(settings) + 1)]
        else:
            children.append(ServiceProcess(name, command))
    return children


def train_workers(settings: Settings) -> int:
    """How many train workers there are: as configured, or as many as the GPUs suffice for, at least one."""
    if settings.train_workers is not None:
        return settings.train_workers
    return max(1, len(visible_gpus()) // settings.gpus_per_job)


def train_worker(command: list[str], number: int, settings: Settings) -> ServiceProcess:
    """It sees every GPU, and leases as many as a job needs. A trainer that is told to stop may take `stop_grace_seconds` to save, and its
    worker a little longer."""
    named = [part.replace("train@%h", f"train-{number}@%h") for part in command]
    return ServiceProcess(f"train-{number}", named, grace_seconds=settings.stop_grace_seconds + 15)


def warden(data_dir: Path, run: str) -> ServiceProcess:
    """It has no mark of its own, because it ends what is marked and must not die with the supervisor it watches."""
    command = [sys.executable, "-m", "app.ops.embedded.sweep", str(data_dir), run, str(os.getpid())]
    return ServiceProcess("warden", command, env={sweep.MARK: f"warden:{run}"}, stop_signal=signal.SIGKILL)


# The servers -----------------------------------------------------------------------------------------------------------


def start_servers(supervisor: Supervisor, settings: Settings, *, migrates: bool = True) -> None:
    """Valkey and PostgreSQL, unless URLs of others are configured; then the newest schema, unless the rows are to stay as they are."""
    if not settings.redis_url:
        valkey = Valkey(settings.data_dir)
        server = supervisor.start(ServiceProcess("valkey", valkey.command(), cwd=valkey.folder, grace_seconds=15))
        os.environ["LUTHIER_REDIS_URL"] = valkey.url
        supervisor.wait_for(lambda: listens(valkey.socket), what=server, seconds=20)
    if not settings.database_url:
        postgres = Postgres(settings.data_dir)
        if not (postgres.folder / "PG_VERSION").exists():
            supervisor.say("Making the database. This happens once.")
        postgres.prepare()
        server = supervisor.start(
            ServiceProcess("postgres", postgres.command(), stop_signal=signal.SIGINT, grace_seconds=60, cwd=Path("/"))
        )
        supervisor.wait_for(lambda: is_open(postgres), what=server, seconds=120)
        os.environ["LUTHIER_DATABASE_URL"] = postgres.url
    get_settings.cache_clear()
    if migrates:
        migrate()


def migrate() -> None:
    from app.migrate import upgrade

    url = get_settings().database_url
    assert url is not None
    upgrade(url)


def free_what_was_held() -> None:
    """The lock is held and leftovers are ended, so every worker that holds a lease in this studio's own database is dead."""
    from app import relay
    from app.db import transaction

    with transaction() as session:
        relay.take_over(session)


def listens(path: Path) -> bool:
    """Whether a server accepts connections on this unix socket."""
    with socket.socket(socket.AF_UNIX) as probe:
        try:
            probe.connect(str(path))
        except OSError:
            return False
        return True


def is_open(postgres: Postgres) -> bool:
    """Whether the server accepts queries (after a crash it first replays its log); creates our database at the first start."""
    import psycopg

    if not (postgres.sockets / ".s.PGSQL.5432").exists():
        return False
    try:
        with psycopg.connect(postgres.url_of("postgres").replace("+psycopg", ""), autocommit=True, connect_timeout=5) as connection:
            found = connection.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,)).fetchone()
            if not found:
                connection.execute(f"CREATE DATABASE {DATABASE}")
    except psycopg.OperationalError:
        return False
    return True


# The address -----------------------------------------------------------------------------------------------------------


def refuse_open_address(settings: Settings) -> None:
    if not is_loopback(settings.host) and not settings.admin_password:
        raise Forbidden(
            f"Luthier does not listen on {settings.host} without a password.",
            hint="Set LUTHIER_ADMIN_PASSWORD to the password of the first account, or leave --host at 127.0.0.1.",
            code="password_needed",
        )


def refuse_taken_port(settings: Settings) -> None:
    """Checked before anything starts; `--port 0` takes a free port."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            raise BadField(
                f"The studio cannot listen on {settings.host}, port {settings.port}: {error.strerror}.",
                hint="Stop what listens there, or choose another port with --port (0 takes a free one).",
                param="port",
            ) from None
        if settings.port == 0:
            os.environ["LUTHIER_PORT"] = str(probe.getsockname()[1])
            settings.port = probe.getsockname()[1]


def studio_url(settings: Settings) -> str:
    """The URL to open in a browser on this machine, or the public one when it is configured."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)  # noqa: S104
    return f"http://{host}:{settings.port}"


def answers(settings: Settings) -> bool:
    """Whether `/readyz` succeeds. No proxy: it is our own process on this machine."""
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(settings.host, f"[{settings.host}]" if ":" in settings.host else settings.host)  # noqa: S104
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(f"http://{host}:{settings.port}/readyz", timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def welcome() -> str:
    """Prepare the first visit: the starter models on disk, at the first start the samples; returns a sign-in link."""
    from app.db import transaction
    from app.web import auth

    with transaction() as session:
        from app.models import imports as model_imports

        user = auth.first_user(session)
        model_imports.adopt_starters(session)
        import_samples(session, user)
        return auth.new_sign_in_link(session, user)


def import_samples(session: Session, user: User) -> None:
    """The small datasets of `samples/`, once: into a studio that never had a file. The first of them is made last, so that lists and forms
    begin with it."""
    from sqlalchemy import select

    from app.datasets import samples
    from app.tables import File

    if session.scalar(select(File.id).limit(1)) is None:
        for sample in reversed(samples.list_()):
            samples.add(session, user, sample["name"])


# Beside a studio, or without one ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def beside(*, migrates: bool = True) -> Iterator[None]:
    """The studio's database and Redis for one command: the running studio's, else started temporarily. Without `migrates` the
    schema stays as it is."""
    settings = get_settings()
    if settings.database_url and settings.redis_url:
        yield
        return
    make_data_dir(settings.data_dir)
    lock = Lock(settings.data_dir)
    holder = lock.holder()
    if holder is not None:
        if holder.get("external"):
            raise Unavailable(
                "The running studio uses a database of its own choosing.",
                hint="Give this command the same LUTHIER_DATABASE_URL and LUTHIER_REDIS_URL as the studio.",
            )
        point_at(Postgres(settings.data_dir), Valkey(settings.data_dir))
        wait_for_start(settings, migrates=migrates)
        yield
        return
    lock.take(url="for one command")
    try:
        sweep.clear(settings.data_dir)
        with servers_for_a_moment(settings, migrates=migrates):
            yield
    finally:
        lock.release()


def point_at(postgres: Postgres, valkey: Valkey) -> None:
    """Make this process use these two."""
    os.environ.setdefault("LUTHIER_DATABASE_URL", postgres.url)
    os.environ.setdefault("LUTHIER_REDIS_URL", valkey.url)
    get_settings.cache_clear()


def wait_for_start(settings: Settings, seconds: float = 60.0, *, migrates: bool = True) -> None:
    """Wait for a studio that has just been started and may still be creating its database."""
    postgres, deadline = Postgres(settings.data_dir), time.monotonic() + seconds
    while not is_open(postgres):
        if time.monotonic() > deadline:
            raise Unavailable("The running studio's database does not answer.", hint=f"See {settings.data_dir / 'logs' / 'postgres.log'}.")
        time.sleep(0.1)
    if migrates:
        migrate()


@contextlib.contextmanager
def servers_for_a_moment(settings: Settings, *, migrates: bool = True) -> Iterator[None]:
    """Both servers as children of this command, ended with it."""
    os.environ[sweep.MARK] = sweep.mark(settings.data_dir, secrets.token_hex(8))
    supervisor = Supervisor(private_folder(settings.data_dir / "logs"), lambda line: print(line, file=sys.stderr))
    try:
        start_servers(supervisor, settings, migrates=migrates)
        yield
    finally:
        supervisor.stopping = 1
        supervisor.stop(SERVERS)
