"""Every number that a GPU's training is to reach, checked and measured by one command, with the goal beside each.

    python -m benchmarks.gpu [--peers trl_tuned,unsloth] [--only NAME,…] [--model 8b=FOLDER] [--json FILE] [--minutes 9 --work FOLDER]

First `benchmarks.gpu_check`: whether every path that only a GPU takes is right. Then each case in processes of its own through
`benchmarks.training`, Luthier compiled from the first step as a long job is. The goals are for one H100 with 80 GB; on another
card the share of its peak is what compares. Weights are drawn at random unless --model names a folder, which the loss of fp8
wants; about an hour on an H100, most of it compiling and drawing 8 B weights. It leaves with 1 if a check or a run failed, not
if a goal was missed.

Where a machine is lent for minutes, --minutes ends it in time: cases are in order of worth, and what there is no time for is "not
run". Cases that FILE holds are not run again, and what --work keeps (weights, compiled kernels) is there for the next call.

    python -m benchmarks.gpu --device cpu --shape tiny    the same way through on a processor: does the script itself work?
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import training

LUTHIER = "luthier_compiled"
LEAST_SECONDS = 60.0
"""A case that has less than this is not begun."""


PEER_DETAILS = ("rounds", "peak_memory_bytes", "clock_mhz", "power_watts", "details")
"""What the report keeps of each peer beside its speed."""


class Goal(NamedTuple):
    """A figure of a case's result, how it is shown, and what it must reach."""

    what: str
    show: str
    reached: Callable[[float], bool]
    words: str


def at_least(what: str, show: str, figure: float, scale: float = 1.0) -> Goal:
    return Goal(what, show, lambda found: found >= figure * scale, f"at least {show.format(figure)}")


def below(what: str, show: str, figure: float) -> Goal:
    return Goal(what, show, lambda found: found < figure, f"below {show.format(figure)}")


SPEED, SHARE, MEMORY, APART = "{:,.0f} tokens/s", "{:.0%} of peak", "{:.1f} GB", "loss {:.2%} apart"


class Case(NamedTuple):
    name: str
    shape: str
    strategy: str
    tokens: int  # of a step
    goals: tuple[Goal, ...]
    more: tuple[str, ...] = ()  # further options of benchmarks.training
    beside: str | None = None  # the case whose losses on the same rows this one's are held against


CASES = (
    Case(
        "1.2b_lora", "1b", "lora", 16_384,
        (at_least("tokens_per_second", SPEED, 95_000), at_least("fraction_of_peak", SHARE, 0.48), at_least("ratio_low", "{:.2f} x the best peer", 1.2)),
    ),
    Case(
        "1.2b_lora_32k", "1b", "lora", 32_768,
        (at_least("tokens_per_second", SPEED, 95_000), at_least("fraction_of_peak", SHARE, 0.48), at_least("ratio_low", "{:.2f} x the best peer", 1.2)),
    ),
    Case("1.2b_full", "1b", "full", 16_384, (at_least("tokens_per_second", SPEED, 55_000),)),
    Case("8b_lora", "8b", "lora", 8192, (at_least("tokens_per_second", SPEED, 13_500),)),
    Case(
        "8b_lora_fp8", "8b", "lora", 8192, (at_least("tokens_per_second", SPEED, 18_000), below("apart", APART, 0.02)),
        ("--frozen-weights", "fp8"), "8b_lora",
    ),
    Case("8b_qlora", "8b", "qlora", 8192, (below("gigabytes", MEMORY, 24.0),), ("--gpu-memory-bytes", str(24 * 2**30))),
)  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    chosen = [case for case in CASES if not options.only or case.name in options.only.split(",")]
    if not chosen:
        raise SystemExit(f"There is no such case. The cases are: {', '.join(case.name for case in CASES)}.")
    until = time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    report: dict[str, Any] = {"device": None, "checks": None, "cases": {}}
    if options.json and Path(options.json).exists():
        report |= json.loads(Path(options.json).read_text())
        report["cases"] = {name: found for name, found in report["cases"].items() if not {"error", "not_run"} & set(found)}
    if not options.no_checks and report["checks"] is None:
        command = [sys.executable, "-m", "benchmarks.gpu_check", "--device", options.device]
        if options.minutes:
            command += ["--minutes", f"{max(1.0, options.minutes / 2):g}"]
        report["checks"] = subprocess.run(command, check=False).returncode == 0
    with tempfile.TemporaryDirectory() as home:
        work = Path(options.work or home).resolve()
        for case in chosen:
            if case.name in report["cases"]:
                print(f"{case.name:16}measured before")
                continue
            found = measure(case, options, work, until)
            report["device"] = found.pop("device", report["device"])
            apart(case, found, report["cases"])
            report["cases"][case.name] = found
            print("\n".join(lines(case, found)), flush=True)
            if options.json:  # after each, so that a run that is cut short leaves what it found
                Path(options.json).write_text(json.dumps(report, indent=1))
    print("\n" + table(report, chosen))
    return int(report["checks"] is False or any("error" in found for found in report["cases"].values()))


def measure(case: Case, options: argparse.Namespace, work: Path, until: float = math.inf) -> dict[str, Any]:
    """Luthier's figures for a case, those of the peers, and Luthier's losses on the same rows; `error`, `refused` or `not_run` where there
    are none. `until` is the time, of the monotonic clock, at which all has to end."""
    if reason := why_not(case, options.device):
        return {"refused": reason}
    if (left := until - time.monotonic()) < LEAST_SECONDS:
        return {"not_run": "no time was left"}
    shape = options.shape or case.shape
    tokens = min(case.tokens, 512) if options.device == "cpu" else case.tokens
    given = [name for name in (options.peers or "").split(",") if name] if "--frozen-weights" not in case.more else []
    peers = [each for name in given for each in (training.in_sizes(name) if options.device == "cuda" else [name])]
    asked = ["--shape", shape, "--strategy", case.strategy, "--tokens", str(tokens), "--device", options.device, *case.more]
    asked += ["--engines", ",".join([LUTHIER if options.device == "cuda" else "luthier", *peers])]
    asked += [
        "--prompt-share",
        str(options.prompt_share),
        "--rounds",
        str(options.rounds),
        "--steps",
        str(options.steps),
        "--limit",
        str(min(options.limit, left)),
    ]
    models = dict(pair.split("=", 1) for pair in options.model)
    asked += [part for pair in options.python for part in ("--python", pair)]
    if shape in models:
        asked += ["--model", models[shape]]
    try:
        done = training.benchmark(training.parser().parse_args(asked), work / shape)
    except subprocess.CalledProcessError as error:  # the weights could not be drawn
        return {"error": f"{error}"}
    own, *others = done["results"]
    if "error" in own:
        return {"error": own["error"].strip()[-500:], "device": done["device"]}
    best = max((other for other in others if "error" not in other), key=lambda other: other["tokens_per_second"], default=None)
    kept = ("tokens_per_second", "fraction_of_peak", "peak_memory_bytes", "loss", "seconds_to_first_step", "rounds", "details")
    return {
        **{name: own[name] for name in kept},
        "device": done["device"],
        "gigabytes": own["peak_memory_bytes"] / 1e9,
        **against(own, best),
        "peers": {other["engine"]: other.get("tokens_per_second", other.get("error")) for other in others},
        "peer_details": {other["engine"]: {key: other[key] for key in PEER_DETAILS if key in other} for other in others},
        "same_rows_losses": next(iter(done["same_rows_losses"].values()), []),
        "losses_agree": done["losses_agree"],
    }


def against(own: dict[str, Any], best: dict[str, Any] | None) -> dict[str, Any]:
    """The ratio to the best peer, and its 95 % interval, whose lower end alone is claimed: without an interval nothing is."""
    if best is None:
        return {}
    found = {"best_peer": best["engine"], "ratio": own["tokens_per_second"] / best["tokens_per_second"]}
    interval = training.ratio_interval(own["rounds"], best["rounds"])
    return found if interval is None else {**found, "ratio_low": interval[0], "ratio_high": interval[1]}


def why_not(case: Case, device: str) -> str | None:
    """Why a case cannot run on this device; None where it can."""
    import torch

    from worker.kernels.gpu import fp8

    if "fp8" in case.more:
        return fp8.why_not(torch.device(device))
    return "A base in 4 bits is for GPUs." if case.strategy == "qlora" and device == "cpu" else None


def apart(case: Case, found: dict[str, Any], cases: dict[str, Any]) -> None:
    """Note the largest share by which a step's loss differs from that of the case beside it on the same rows."""
    other = cases.get(case.beside or "", {})
    if found.get("same_rows_losses") and other.get("same_rows_losses"):
        found["apart"] = training.farthest({"one": found["same_rows_losses"], "two": other["same_rows_losses"]})


def lines(case: Case, found: dict[str, Any]) -> list[str]:
    """A line for each goal of a case: what was found, what is wanted, and whether it was reached."""
    said = []
    for goal in case.goals:
        value = found.get(goal.what)
        if value is None:
            why = (
                found.get("refused")
                or found.get("not_run")
                or (f"failed: {found['error'].splitlines()[-1][:120]}" if found.get("error") else None)
                or ("too few rounds" if "ratio" in found and goal.what == "ratio_low" else "nothing to compare with")
            )
            said.append(f"{case.name:16}{'–':>26}   {goal.words:34}{'not run' if 'not_run' in found else 'not measured'} ({why})")
        else:
            said.append(f"{case.name:16}{goal.show.format(value):>26}   {goal.words:34}{'reached' if goal.reached(value) else 'MISSED'}")
    return said


def table(report: dict[str, Any], chosen: list[Case]) -> str:
    checks = {True: "all right", False: "SOME FAILED, see above", None: "left out"}[report["checks"]]
    head = [f"{report['device'] or 'no device'}; checks: {checks}", f"{'case':16}{'found':>26}   {'goal on one H100':34}"]
    return "\n".join([*head, *(line for case in chosen for line in lines(case, report["cases"][case.name]))])


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    made.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    made.add_argument("--only", help=f"some of {', '.join(case.name for case in CASES)}, separated by commas")
    made.add_argument("--shape", help="one shape for all cases, to try the script")
    made.add_argument(
        "--peers", help="engines of benchmarks.training to run beside, such as trl_tuned,unsloth, which is run at several sizes"
    )
    made.add_argument("--model", action="append", default=[], metavar="SHAPE=FOLDER", help="a real model instead of random weights")
    made.add_argument("--minutes", type=float, help="end within so many; what there is no time for is not run")
    made.add_argument("--python", action="append", default=[], metavar="ENGINE=PATH", help="an engine's own interpreter, such as unsloth's")
    made.add_argument("--rounds", type=int, default=3, help="of each engine, in turn; with fewer than 3 no ratio is claimed")
    made.add_argument(
        "--prompt-share", type=float, default=0.0, help="share of each sample that is not learnt, as a prompt is; 0.35 is usual"
    )
    made.add_argument("--steps", type=int, default=20, help="timed steps")
    made.add_argument("--limit", type=float, default=1200, help="seconds that one engine's run may take")
    made.add_argument("--no-checks", action="store_true", help="leave benchmarks.gpu_check out")
    made.add_argument("--work", help="keep weights and samples in this folder")
    made.add_argument("--json")
    return made


if __name__ == "__main__":
    sys.exit(main())
