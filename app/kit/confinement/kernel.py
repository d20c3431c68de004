"""Linux system calls for sandboxing: namespaces, mounts, Landlock, seccomp, capabilities, limits.

Standard library only: `enter.py` runs with it before a program of ours starts. Every call raises OSError that says which one
failed. Numbers are those of x86-64 and aarch64; newer system calls have one number on both.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import resource
import socket
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
LIBC.syscall.restype = ctypes.c_long

NEW_USER, NEW_MOUNTS, NEW_NETWORK, NEW_IPC = 0x10000000, 0x00020000, 0x40000000, 0x08000000
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_ENTER = 444, 445, 446
_AT_FDCWD, _AT_EMPTY_PATH, _AT_RECURSIVE = -100, 0x1000, 0x8000
_MS_NOSUID, _MS_NODEV, _MS_NOEXEC, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x2, 0x4, 0x8, 0x4000, 0x40000, 0x2
READ_ONLY, NO_SUID, NO_DEVICES, MAPPED = 0x1, 0x2, 0x4, 0x00100000
ARM = platform.machine() in ("aarch64", "arm64")


def _call(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def syscall(name: str, number: int, *arguments: object) -> int:
    """A system call without a glibc wrapper. Integers are passed as 64 bits, as variadic arguments are read."""
    given = [ctypes.c_long(a) if isinstance(a, int) else a for a in arguments]
    return _call(name, LIBC.syscall(ctypes.c_long(number), *given))


def prctl(name: str, *arguments: int) -> int:
    return _call(f"prctl({name})", LIBC.prctl(*(ctypes.c_ulong(a) for a in (*arguments, 0, 0, 0, 0)[:5])))


# Namespaces and mounts --------------------------------------------------------------------------------------------------


def unshare(flags: int) -> None:
    _call("unshare", LIBC.unshare(flags))


def keep_own_ids(uid: int, gid: int) -> None:
    """In a new user namespace, map the current ids to themselves and no others."""
    for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def user_namespace(outside: int, inside: int) -> int:
    """A descriptor of a user namespace that maps one user and the group of the same number, for id-mapped mounts. Only for root."""
    ready, go = os.pipe(), os.pipe()
    if (child := os.fork()) == 0:
        with contextlib.suppress(OSError):
            unshare(NEW_USER)
            os.write(ready[1], b"x")
            os.close(go[1])
            os.read(go[0], 1)
        os._exit(0)
    try:
        os.close(ready[1])
        if not os.read(ready[0], 1):
            raise OSError(errno.EPERM, "unshare(user): not allowed")
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{name}", "w") as file:
                file.write(f"{outside} {inside} 1")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    finally:
        for end in (ready[0], *go):
            os.close(end)
        os.waitpid(child, 0)


def mount(kind: str, target: str, options: str = "") -> None:
    flags = _MS_NOSUID | _MS_NODEV | (_MS_NOEXEC if kind == "proc" else 0)
    given = (kind.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode())
    _call(f"mount({kind})", LIBC.mount(*given))


def keep_mounts_private() -> None:
    _call("mount(private)", LIBC.mount(None, b"/", None, ctypes.c_ulong(_MS_REC | _MS_PRIVATE), None))


def copy_of(path: str, attributes: int, mapping: int | None = None) -> int:
    """A detached recursive mount of `path`; with `mapping` its files' owner is the namespace's user."""
    tree = syscall("open_tree", _OPEN_TREE, _AT_FDCWD, path.encode(), 1 | os.O_CLOEXEC | _AT_RECURSIVE)
    attributes |= NO_SUID | (MAPPED if mapping is not None else 0)
    wanted = struct.pack("QQQQ", attributes, 0, 0, mapping or 0)
    try:
        syscall("mount_setattr", _MOUNT_SETATTR, tree, b"", _AT_EMPTY_PATH | _AT_RECURSIVE, wanted, len(wanted))
    except OSError:
        os.close(tree)
        raise
    return tree


def attach(tree: int, target: str) -> None:
    syscall("move_mount", _MOVE_MOUNT, tree, b"", _AT_FDCWD, target.encode(), 0x4)
    os.close(tree)


def make_root(folder: str) -> None:
    """pivot_root to `folder`, which is a mount, and unmount the old root."""
    os.chdir(folder)
    syscall("pivot_root", 41 if ARM else 155, b".", b".")
    uncover(".")
    os.chdir("/")


def uncover(folder: str) -> None:
    _call("umount", LIBC.umount2(folder.encode(), _MNT_DETACH))


def raise_loopback() -> None:
    """Bring up 127.0.0.1, over which processes of one job communicate; it is down in a new network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        fcntl.ioctl(any_socket, 0x8914, struct.pack("16sh22x", b"lo", 0x1 | 0x40))  # SIOCSIFFLAGS, IFF_UP | IFF_RUNNING


# Landlock ---------------------------------------------------------------------------------------------------------------

_EXECUTE, _WRITE, _READ, _LIST = 0x1, 0x2, 0x4, 0x8
_IOCTL = 1 << 15
_ALL_BY_ABI = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 4: (1 << 15) - 1}
_OF_FILES = _EXECUTE | _WRITE | _READ | 1 << 14 | _IOCTL


class Landlock:
    """A Landlock rule set: only paths that are allowed are accessible, irrevocably."""

    def __init__(self, network: bool) -> None:
        self.abi = syscall("landlock_create_ruleset", _LANDLOCK_CREATE, 0, 0, 1)
        self.all = _ALL_BY_ABI.get(self.abi, (1 << 16) - 1)
        tcp = 0x3 if self.abi >= 4 and not network else 0
        scopes = 0x3 if self.abi >= 6 else 0  # abstract unix sockets of others, signals to others
        rules = struct.pack("QQQ", self.all, tcp, scopes)[: 24 if self.abi >= 6 else 16 if self.abi >= 4 else 8]
        self.rules = syscall("landlock_create_ruleset", _LANDLOCK_CREATE, rules, len(rules), 0)

    def allow(self, path: str, what: str) -> None:
        """`what` is read, write, list or device. A path that does not exist is skipped."""
        wanted = {"read": _EXECUTE | _READ | _LIST, "list": _LIST, "device": _READ | _WRITE | _IOCTL | _LIST, "write": self.all}[what]
        try:
            handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            return
        try:
            if not os.path.isdir(path):
                wanted &= _OF_FILES
            if wanted & self.all:
                syscall("landlock_add_rule", _LANDLOCK_ADD, self.rules, 1, struct.pack("=Qi", wanted & self.all, handle), 0)
        finally:
            os.close(handle)

    def enter(self) -> None:
        syscall("landlock_restrict_self", _LANDLOCK_ENTER, self.rules, 0)
        os.close(self.rules)


# Seccomp ----------------------------------------------------------------------------------------------------------------

# fmt: off
_FORBIDDEN = {  # name: (x86-64, aarch64); None where there is none
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272), "pidfd_getfd": (438, 438),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "bpf": (321, 280), "perf_event_open": (298, 241), "userfaultfd": (323, 282), "fanotify_init": (300, 262), "syslog": (103, 116),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "io_uring_register": (427, 427),  # its sockets pass no filter
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51), "open_tree": (428, 428),
    "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "init_module": (175, 105), "finit_module": (313, 273), "delete_module": (176, 106), "kexec_load": (246, 104),
    "kexec_file_load": (320, 294), "reboot": (169, 142), "swapon": (167, 224), "swapoff": (168, 225), "acct": (163, 89),
    "quotactl": (179, 60), "quotactl_fd": (443, 443), "settimeofday": (164, 170), "clock_settime": (227, 112),
    "adjtimex": (159, 171), "clock_adjtime": (305, 266), "sethostname": (170, 161), "setdomainname": (171, 162),
    "iopl": (172, None), "ioperm": (173, None), "modify_ldt": (154, None), "uselib": (134, None), "vhangup": (153, 58),
}
# fmt: on
_SOCKET, _CLONE, _CLONE3 = (198, 220, 435) if ARM else (41, 56, 435)
_NEW_ANYTHING = 0x7E020000  # every CLONE_NEW… flag
_LOAD, _EQUAL, _AT_LEAST, _ANY_OF, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000


def forbid_calls(families: tuple[int, ...]) -> None:
    """Refuse what no training needs, and sockets but of these address families. Needs no_new_privs."""
    program: list[tuple[int, int, int, int]] = []

    def add(code: int, k: int, if_true: int = 0, if_false: int = 0) -> None:
        program.append((code, if_true, if_false, k))

    def refuse(number: int, error: int) -> None:
        add(_EQUAL, number, 0, 1)
        add(_RETURN, _REFUSE | error)

    add(_LOAD, 4)  # of which architecture the call is
    add(_EQUAL, 0xC00000B7 if ARM else 0xC000003E, 1, 0)
    add(_RETURN, _REFUSE | errno.ENOSYS)
    add(_LOAD, 0)  # its number
    if not ARM:
        add(_AT_LEAST, 0x40000000, 0, 1)  # x32
        add(_RETURN, _REFUSE | errno.ENOSYS)
    for numbers in _FORBIDDEN.values():
        if (number := numbers[ARM]) is not None:
            refuse(number, errno.EPERM)
    refuse(_CLONE3, errno.ENOSYS)  # its flags lie in memory, where no filter can look; glibc then takes clone
    add(_EQUAL, _CLONE, 0, 4)
    add(_LOAD, 16)
    add(_ANY_OF, _NEW_ANYTHING, 0, 1)
    add(_RETURN, _REFUSE | errno.EPERM)
    add(_RETURN, _ALLOW)
    add(_EQUAL, _SOCKET, 0, len(families) + 3)
    add(_LOAD, 16)
    for place, family in enumerate(families):
        add(_EQUAL, family, len(families) - place, 0)
    add(_RETURN, _REFUSE | errno.EACCES)
    add(_RETURN, _ALLOW)
    add(_RETURN, _ALLOW)
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *one) for one in program))
    filter_ = struct.pack("HxxxxxxP", len(program), ctypes.addressof(code))
    allow_speculation = 1 << 2  # kernels before 5.16 slow down all arithmetic of a filtered process otherwise
    syscall("seccomp", 277 if ARM else 317, 1, allow_speculation, filter_)


# Who, and how much ------------------------------------------------------------------------------------------------------


def drop_capabilities() -> None:
    """All of them, and for programs yet to be started too."""
    prctl("PR_CAP_AMBIENT", 47, 4)
    for capability in range(64):
        try:
            prctl("PR_CAPBSET_DROP", 24, capability)
        except OSError as error:
            if error.errno == errno.EINVAL:
                break  # there are no more
            if _read_capabilities():
                raise


def lay_down_capabilities() -> None:
    """The ones this process still has."""
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", *[0] * 6)
    _call("capset", LIBC.capset(header, none))


def _read_capabilities() -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1], 16) for line in file if line.startswith("CapEff:"))


def limit(name: str, value: int) -> None:
    """Both the soft and the hard one; never above what is set already."""
    what = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))
