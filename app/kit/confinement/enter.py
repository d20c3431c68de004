"""Confines this process, layer by layer, then becomes the program. Run as a plain script, never imported.

    python -I -S enter.py ORDER PROGRAM [ARGUMENT …]

ORDER is JSON, as `app.kit.confinement.confined` writes it. A layer that this machine does not allow is skipped; where `required`
is set, a wall without any layer ends the process instead. The program finds in `LUTHIER_CONFINED` which layers hold. Small and
free of threads, because little is safe between fork and exec of a threaded process.

The order matters: mounts and users need privileges that are dropped afterwards; a change of user clears the death signal, so it
is requested after that; Landlock would forbid mounting, and seccomp both.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import sys

TYPE_CHECKING = False  # `typing` has it too, and takes long to import
if TYPE_CHECKING:
    from typing import TypedDict

    from app.kit.confinement import kernel

    class Order(TypedDict):
        """What `app.kit.confinement.confined` writes, and what is determined on the way."""

        system: list[str]
        links: dict[str, str]
        project: str
        read: list[str]
        write: list[str]
        devices: list[str]
        sockets: str
        limits: dict[str, int]
        uid: int
        own_uid: int
        parent: int
        layers: list[str]
        required: bool
        report: bool
        private: bool
else:
    sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
    import kernel  # its sibling file, without the package around it

WALLS = {"files": ("mounts", "landlock"), "network": ("network", "seccomp"), "privileges": ("capabilities",), "memory": ("limits",)}
"""What `required` insists on, and the layers that provide it."""

INTERNET = (socket.AF_UNIX, socket.AF_INET, socket.AF_INET6, 16)
FAMILIES = {"none": (), "local": (socket.AF_UNIX, 16), "loopback": INTERNET, "network": INTERNET}
"""Socket families a program may create; 16 is netlink, by which libraries enumerate network interfaces."""


def main(arguments: list[str]) -> None:
    order: Order = json.loads(arguments[0])
    command = arguments[1:]
    order["private"] = False  # whether the root is this process's own
    order["own_uid"], order["uid"] = order["uid"], 0  # only where the data's files can be mapped to it as its own
    where, held, missing = os.getcwd(), [], {}
    layers = [
        ("limits", limits), ("mounts", mounts), ("network", network), ("capabilities", capabilities),
        ("parent", die_with_parent), ("landlock", landlock), ("seccomp", seccomp),
    ]  # fmt: skip
    for name, layer in layers:
        if name not in order["layers"] and name != "parent":
            missing[name] = "switched off"
            continue
        try:
            held += layer(order) or [name]
        except (OSError, ValueError) as error:
            missing[name] = getattr(error, "strerror", None) or str(error)
    with contextlib.suppress(OSError):
        os.chdir(where)
    if order["report"]:
        print(json.dumps({"held": held, "missing": missing, "uid": os.getuid()}))
        return
    if order["required"] and (open_ := [wall for wall, by in WALLS.items() if not set(by) & set(held)]):
        reasons = "; ".join(f"{name}: {why}" for name, why in missing.items())
        raise SystemExit(f"LUTHIER_CONFINEMENT=required, and this machine does not wall off: {', '.join(open_)} ({reasons})")
    os.environ["LUTHIER_CONFINED"] = ",".join(held)
    os.execv(command[0], command)  # noqa: S606  # a list of words needs no shell


# The layers ---------------------------------------------------------------------------------------------------------------


def limits(order: Order) -> None:
    for name, value in order["limits"].items():
        kernel.limit(name, value)
    with open("/proc/self/oom_score_adj", "w") as file:
        file.write("500")  # when memory runs out, this process is killed before the database is


def mounts(order: Order) -> None:
    """A root that contains what is allowed and nothing else. As root, also a user id of its own, to which the data's files are
    mapped: their owner on disk stays the same."""
    uid, gid, mapping = os.geteuid(), os.getegid(), None
    with contextlib.suppress(OSError):
        if uid == 0 and order["own_uid"]:
            mapping = kernel.user_namespace(0, order["own_uid"])
    kernel.unshare(kernel.NEW_MOUNTS | kernel.NEW_IPC | (0 if uid == 0 else kernel.NEW_USER))
    if uid != 0:
        kernel.keep_own_ids(uid, gid)
    kernel.keep_mounts_private()
    try:
        trees = copies(order, mapping)
    except OSError:
        if mapping is None:
            raise
        mapping, trees = None, copies(order, None)  # a file system without id-mapped mounts
    build(order, trees)
    order["private"] = True
    if mapping is not None:
        order["uid"] = order["own_uid"]


def copies(order: Order, mapping: int | None) -> dict[str, int]:
    """Path → mount to be attached there, made while the whole tree is still visible."""
    trees = {}
    for path in order["system"]:
        trees[path] = kernel.copy_of(path, kernel.READ_ONLY)
    for path in [*order["devices"], "/sys"]:
        if os.path.exists(path):
            trees[path] = kernel.copy_of(path, kernel.READ_ONLY if path == "/sys" else 0)
    for path in order["read"]:
        trees[path] = kernel.copy_of(path, kernel.READ_ONLY | kernel.NO_DEVICES, mapping)
    for path in order["write"]:
        trees[path] = kernel.copy_of(path, kernel.NO_DEVICES, mapping)
    trees["/proc"] = kernel.copy_of("/proc", 0)
    return trees


def build(order: Order, trees: dict[str, int]) -> None:
    root = "/tmp"  # noqa: S108  # any folder will do: it is covered in this process's view alone
    kinds = {path: stat.S_ISDIR(os.fstat(tree).st_mode) for path, tree in trees.items()}
    kernel.mount("tmpfs", root, "mode=755,size=16m")
    try:
        for folder in ("/tmp", "/dev/shm"):  # noqa: S108
            os.makedirs(root + folder)
            kernel.mount("tmpfs", root + folder, "mode=1777")
        for path, target in order["links"].items():
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            os.symlink(target, root + path)
        for path in sorted(trees, key=lambda path: path.count("/")):  # parents before their children
            place = root + path
            if path == "/proc" and fresh_proc(place):
                continue
            if not os.path.lexists(place):
                os.makedirs(place if kinds[path] else os.path.dirname(place), exist_ok=True)
                if not kinds[path]:
                    os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
            kernel.attach(trees[path], place)
        os.makedirs(root + order["project"], exist_ok=True)
        for name, number in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
            os.symlink(f"/proc/self/fd{number}", f"{root}/dev/{name}")
        kernel.make_root(root)
    except OSError:
        kernel.uncover(root)
        raise


def fresh_proc(place: str) -> bool:
    """A /proc that shows no process of other users. Only root can mount one without a PID namespace."""
    os.makedirs(place, exist_ok=True)
    try:
        kernel.mount("proc", place, "hidepid=ptraceable")
    except OSError:
        return False
    return True


def network(order: Order) -> None:
    """No interface except loopback; all of them for a process whose job is on other machines too."""
    if order["sockets"] == "network":
        raise ValueError("its job is on several machines")
    kernel.unshare(kernel.NEW_NETWORK)
    kernel.raise_loopback()


def capabilities(order: Order) -> list[str]:
    kernel.drop_capabilities()
    held = ["capabilities"]
    if order["uid"] and os.geteuid() == 0:
        os.setgroups(sorted({os.stat(path).st_gid for path in order["devices"] if os.path.exists(path)} - {0}))
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):  # several processes of one job open their parent's pipe by its name
                if stat.S_ISFIFO(os.fstat(int(name)).st_mode):
                    os.fchown(int(name), order["uid"], order["uid"])
        os.setresgid(*[order["uid"]] * 3)
        os.setresuid(*[order["uid"]] * 3)
        held.append("uid")
    kernel.lay_down_capabilities()
    kernel.prctl("PR_SET_NO_NEW_PRIVS", 38, 1)
    return held


def die_with_parent(order: Order) -> list[str]:
    if order["parent"]:
        kernel.prctl("PR_SET_PDEATHSIG", 1, 9)
        if os.getppid() != order["parent"]:
            raise SystemExit("the parent died before its child started")
    return []


def landlock(order: Order) -> None:
    rules = kernel.Landlock(network=order["sockets"] in ("loopback", "network"))
    for path in [*order["system"], *order["read"], "/proc", "/sys"]:
        rules.allow(path, "read")
    inside = [*order["system"], *order["read"], *order["write"]]
    own_tmp = order["private"] and not any(path.startswith("/tmp/") for path in inside)  # noqa: S108
    for path in [*order["write"], "/dev/shm", *(["/tmp"] if own_tmp else [])]:  # noqa: S108
        rules.allow(path, "write")
    for path in order["devices"]:
        rules.allow(path, "device")
    rules.allow(order["project"], "list")  # Python lists it to find our modules
    rules.enter()


def seccomp(order: Order) -> None:
    kernel.forbid_calls(FAMILIES[order["sockets"]])


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        raise SystemExit(f"cannot start {sys.argv[2]}: {error}") from None
