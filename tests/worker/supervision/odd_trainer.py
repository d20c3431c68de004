"""A trainer that misbehaves on purpose: `python odd_trainer.py HOW FD FOLDER`. Real processes, signals, pipes and exits; only the
learning is left out, since no real trainer can be made to fail in these ways at will."""

import json
import os
import signal
import subprocess
import sys
import time

how, fd, folder = sys.argv[1], int(sys.argv[2]), sys.argv[3]
pipe = os.fdopen(fd, "w", buffering=1)


def say(**event):
    pipe.write(json.dumps(event) + "\n")


def step(n):
    say(type="step", step=n, epoch=n / 10, loss=1.0, learning_rate=1e-3, grad_norm=1.0, tokens=n, trained_tokens=n,
        tokens_per_second=1.0, memory_bytes=1, seconds=n / 10)  # fmt: skip


if how == "slow":  # as one that imports for long, before it hears signals
    time.sleep(2)
if how in ("polite", "slow"):
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
    signal.signal(signal.SIGUSR1, lambda *_: say(type="saved", step=1, path=f"{folder}/x", bytes=1, manifest_sha256="0" * 64))
say(type="started", device="cpu", precision="fp32", total_steps=10, train_rows=4, validation_rows=0, train_tokens=9,
    trainable_parameters=1, parameters=2)  # fmt: skip
step(1)
if how == "exit":
    print("Traceback: the reason is here", file=sys.stderr)
    sys.exit(3)
if how == "segfault":
    os.kill(os.getpid(), signal.SIGSEGV)
if how == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if how == "disk":
    sys.exit("OSError: [Errno 28] No space left on device: 'checkpoint'")
if how == "memory":
    sys.exit("MemoryError")
if how == "liar":  # says it finished, with no result on disk
    measured = {"peak_memory_bytes": 1, "seconds": 1, "tokens_per_second": 1, "tokens": 1, "trained_tokens": 1, "steps": 1, "device": "cpu"}
    say(type="finished", reason="completed", step=10, path=f"{folder}/final", bytes=1, revision="r", adapter_sha256=None, kind="dialogue",
        measured=measured)  # fmt: skip
    sys.exit(0)
if how == "garbage":
    pipe.write("this is no JSON\n")
    say(type="unheard_of")
    step(2)
    sys.exit(3)
if how == "family":  # leaves a child behind that holds the pipe
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=[fd])
    print("child", child.pid, flush=True)
    sys.exit(3)
if how == "thief":  # as the code of a hostile model

    def can(path, mode="rb"):
        try:
            with open(path, mode):
                return True
        except OSError:
            return False

    data = os.environ["LUTHIER_DATA_DIR"]
    found = {
        "secret": can(f"{data}/secrets/postgres"),
        "parent": can(f"/proc/{os.getppid()}/environ"),
        "own": can(f"{data}/{folder}/x", "wb"),
    }
    say(type="log", message=json.dumps(found | {"held": os.environ["LUTHIER_CONFINED"].split(",")}))
    sys.exit(3)
if how == "runaway":  # its grandchild leaves the process group, the session and its parent
    code = "import os, subprocess; print('runaway', subprocess.Popen(['sleep', '600'], start_new_session=True).pid, os.environ['LUTHIER_CONFINED'])"
    subprocess.run([sys.executable, "-c", code], start_new_session=True)
    time.sleep(2)  # a supervisor looks several times a second
    sys.exit(3)
if how == "liar-of-checkpoints":
    for n in range(1, 6):
        say(type="saved", step=n, path="models/victim", bytes=1, manifest_sha256="0" * 64)
    sys.exit(3)
if how == "environment":
    say(type="log", message=json.dumps(dict(os.environ)))
    sys.exit(75)
if how == "chatty":
    for n in range(400):
        print(f"{n:9999}", flush=True)
        time.sleep(0.005)
    sys.exit("Traceback: the reason is here")
if how == "stubborn":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    say(type="log", message="deaf")
if how in ("polite", "slow"):
    say(type="log", message="ready")
    for n in range(2, 100_000):
        step(n)
        time.sleep(0.02)
time.sleep(600)
