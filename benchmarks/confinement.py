"""What a process behind the walls reaches, layer by layer, and what the walls cost: `python -m benchmarks.confinement`.

A studio's data folder is laid out, with a secret, two models and two jobs; a broker's socket, a port and a process of the same
user stand beside it. Then `tests/security/burglar.py` tries everything from inside, once for each choice of layers: all of
them, those that most containers allow, those of older kernels, none. Run it as root and as an ordinary user: the layers differ.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CHOICES = {
    "all": ("limits", "mounts", "network", "capabilities", "landlock", "seccomp"),
    "no namespaces": ("limits", "capabilities", "landlock", "seccomp"),
    "no landlock": ("limits", "mounts", "network", "capabilities", "seccomp"),
    "no seccomp": ("limits", "mounts", "network", "capabilities", "landlock"),
    "none": (),
}
MEBIBYTES, TASKS = 512, 50


@contextlib.contextmanager
def house() -> Iterator[dict[str, Any]]:
    """A data folder and what stands around it; gives the burglar's targets."""
    with tempfile.TemporaryDirectory(prefix="luthier-walls-") as name, contextlib.ExitStack() as stack:
        data = Path(name)
        os.environ["LUTHIER_DATA_DIR"] = name
        targets = {
            "model": "models/mine/config.json", "other_model": "models/other/config.json", "rows": "rows/mine/f1.parquet",
            "secret": "secrets/postgres", "checkpoint": "runs/mine/a1/checkpoint-1/state.json", "other_job": "runs/other/a1/trainer.log",
        }  # fmt: skip
        for path in targets.values():
            (data / path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            (data / path).write_text("x")
            (data / path).chmod(0o600)
        own, broker = data / "runs" / "mine" / "a2", data / "run" / "valkey" / "valkey.sock"
        for folder in (own, own / "tmp", broker.parent):
            folder.mkdir(parents=True, mode=0o700)
        abstract = f"\0luthier-walls-{os.getpid()}"
        for family, address in ((socket.AF_UNIX, str(broker)), (socket.AF_UNIX, abstract), (socket.AF_INET, ("0.0.0.0", 0))):
            listener = stack.enter_context(socket.socket(family))
            listener.bind(address)
            listener.listen(64)
        victim = stack.enter_context(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]))
        stack.callback(victim.kill)
        source = Path(__file__).resolve().parent.parent / "app" / "burgled.txt"
        stack.callback(source.unlink, missing_ok=True)
        yield {
            **{name: str(data / path) for name, path in targets.items()},
            "own": str(own), "data": str(data), "broker": str(broker), "abstract": abstract, "source": str(source), "victim": victim.pid,
            "port": listener.getsockname()[1], "address": address_of_this_machine(), "home": os.path.expanduser("~"),
            "mebibytes": 2 * MEBIBYTES, "files": 20_000, "tasks": 5 * TASKS,
        }  # fmt: skip


def address_of_this_machine() -> str:
    """One that is not loopback's, where there is one."""
    import psutil

    found = [a.address for addresses in psutil.net_if_addrs().values() for a in addresses if a.family == socket.AF_INET]
    return next((address for address in found if not address.startswith("127.")), "127.0.0.2")


def burgle(targets: dict[str, Any], layers: tuple[str, ...], sockets: str = "none") -> dict[str, Any]:
    """What goes through from inside a room as a trainer's."""
    from app.kit import confinement
    from app.settings import PROJECT

    confinement.MAX_TASKS = TASKS
    running = int(Path("/proc/loadavg").read_text().split()[3].partition("/")[2])
    targets = targets | {"tasks": targets["tasks"] + running}
    data, own = Path(targets["data"]), Path(targets["own"])
    for leftover in own.iterdir():
        if leftover.name != "tmp":
            subprocess.run(["rm", "-rf", str(leftover)], check=True)
    Path(targets["checkpoint"]).write_text("x")
    room = confinement.Confinement(
        read=[data / "models" / "mine", data / "rows" / "mine" / "f1.parquet", own.parent],
        write=[own],
        sockets=sockets,
        memory_bytes=MEBIBYTES << 20,
        layers=layers,
    )
    command = confinement.confined([sys.executable, "-m", "tests.security.burglar", json.dumps(targets)], room)
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "TMPDIR": str(own / "tmp"), "HOME": str(own)}
    environment |= {"OPENBLAS_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise SystemExit(f"the burglar with {layers} ended with {done.returncode}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout)
    written = own / "result"
    found["written_by"] = written.stat().st_uid if written.exists() else None
    return found


def cost(tries: int = 15) -> dict[str, float]:
    """Milliseconds that the walls add to the start of a program: the middle of some tries, taken in turn."""
    from app.kit import confinement
    from app.settings import PROJECT

    bare = [sys.executable, "-I", "-S", "-c", "pass"]
    taken: dict[str, list[float]] = {"bare": [], "behind walls": []}
    for _ in range(tries):
        for name, command in (("bare", bare), ("behind walls", confinement.confined(bare, confinement.Confinement()))):
            began = time.perf_counter()
            subprocess.run(command, cwd=PROJECT, check=True)
            taken[name].append(1000 * (time.perf_counter() - began))
    return {name: round(statistics.median(times), 1) for name, times in taken.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.confinement", description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="write what was found to this file, - for standard output")
    parser.add_argument("--no-costs", action="store_true", help="leave out how long a start takes")
    options = parser.parse_args(arguments)
    with house() as targets:
        found = {name: burgle(targets, layers) for name, layers in CHOICES.items()}
        spent = None if options.no_costs else cost()
    if options.json:
        text = json.dumps({"layers": found, "milliseconds": spent}, indent=1)
        print(text) if options.json == "-" else Path(options.json).write_text(text)
        return
    print(f"As {'root' if os.geteuid() == 0 else f'user {os.geteuid()}'}; x went through, . did not\n")
    for name, one in found.items():
        print(f"{name}: as user {one['uid']}, {', '.join(one['held']) or 'nothing holds'}")
    print("\n" + " " * 36 + "  ".join(name.rjust(13) for name in found))
    for what in next(iter(found.values()))["went_through"]:
        print(what.ljust(36) + "  ".join(("x" if one["went_through"][what] else ".").rjust(13) for one in found.values()))
    if spent:
        print(f"\nStart of a program: {spent['bare']} ms bare, {spent['behind walls']} ms behind walls (median of 15)")


if __name__ == "__main__":
    main()
