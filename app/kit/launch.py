"""Starts one program so that it cannot outlive its parent: run as a plain script, never imported.

    python -I -S launch.py PARENT_PID SIGNAL IDENTITY PROGRAM [ARGUMENT …]

SIGNAL is sent to the program when the parent dies. IDENTITY is the user it runs as:

    self        the caller
    UID:GID     that user, for a database started by root
    namespace:UID   in a user namespace where the caller's own uid has that number, so that a program which refuses to
                    run as root runs, while every file keeps its owner; UID must be one that /etc/passwd names

A small script instead of `preexec_fn`, because the latter runs Python between fork and exec, where a lock held by another thread
would never be released. The order matters: a change of user clears the death signal, so it is requested last, and a parent that
died before that is noticed by its changed pid.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1
CLONE_NEWUSER = 0x10000000


def enter_namespace(libc: ctypes.CDLL, inside: int) -> None:
    uid, gid = os.geteuid(), os.getegid()
    if libc.unshare(CLONE_NEWUSER) != 0:
        raise OSError(ctypes.get_errno(), "this kernel or container does not allow user namespaces")
    for name, content in (("setgroups", "deny"), ("uid_map", f"{inside} {uid} 1"), ("gid_map", f"{inside} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(content)


def main(arguments: list[str]) -> None:
    parent, signal, identity, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if identity.startswith("namespace:"):
        enter_namespace(libc, int(identity.partition(":")[2]))
    elif identity != "self":
        uid, _, gid = identity.partition(":")
        os.setgroups([])
        os.setresgid(int(gid), int(gid), int(gid))
        os.setresuid(int(uid), int(uid), int(uid))
    if libc.prctl(PR_SET_PDEATHSIG, int(signal), 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != int(parent):
        raise SystemExit("the parent died before its child started")
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except OSError as error:
        raise SystemExit(f"cannot start {sys.argv[4]}: {error}") from None
