"""The corpus of `tests/datasets/malformed.py` through a real web process and the data worker's real children, as a table."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
import uuid
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from tests.datasets.malformed import MAX_BYTES, MAX_SECONDS, Case, cases


class Outcome(NamedTuple):
    """What the studio made of a case. `faults` are the promises it broke; `bytes` is the child's largest memory, 0 where no
    child was needed."""

    case: Case
    status: int
    what: str
    line: int | None
    message: str
    fix: str
    seconds: float
    bytes: int
    faults: list[str]


OF_THE_FILE = ("few_rows", "one_class")
"""Findings about all rows together, which no line is at fault for."""


def judge(case: Case, status: int, answer: dict[str, Any], seconds: float, peak: int) -> Outcome:
    """Hold one answer to the promises: no 5xx, a message with file, line and a hint, in time and in memory."""
    faults = []
    if status != 200:
        error = answer.get("error") or {}
        what, line, message, fix = "refused", None, str(error.get("message")), str(error.get("hint") or error.get("message"))
        if not 400 <= status < 500 or not error.get("message"):
            faults.append(f"HTTP {status}")
    elif answer["status"] == "error":
        error = answer["error"]
        what, line, message, fix = "error", error.get("line"), error["message"], error.get("hint") or ""
        if not line or not error.get("file"):
            faults.append("no file or no line")
        if not fix:
            faults.append("no fix")
    else:
        found = next((f for f in answer["findings"] if f["rule"] == case.rule), answer["findings"][0] if answer["findings"] else None)
        what = found["rule"] if found else "good"
        line = found["line"] if found else None
        message = found["message"] if found else f"{answer['good_rows']} rows are good."
        fix = ((found or {}).get("fix") or {}).get("label") or message
        for one in answer["findings"]:
            if not one["message"] or (not one["line"] and one["rule"] not in OF_THE_FILE):
                faults.append(f"{one['rule']} without a line")
            if one["severity"] == "error" and not one["fix"] and len(one["message"].split(". ")) < 2:
                faults.append(f"{one['rule']} without a fix")
    if what != case.rule and not (case.rule == "good" and what not in ("error", "refused")):
        faults.append(f"{what}, not {case.rule}")
    if case.line is not None and line != case.line:
        faults.append(f"line {line}, not {case.line}")
    if seconds > MAX_SECONDS:
        faults.append(f"{seconds:.1f} s")
    if peak > MAX_BYTES:
        faults.append(f"{peak / 2**20:,.0f} MB")
    return Outcome(case, status, what, line, message, fix, seconds, peak, faults)


class Children:
    """The data worker of this process, with the largest memory of each child it starts."""

    def __init__(self) -> None:
        from app.kit import sandbox

        self.peak, self.cpu, self._run = 0, 0.0, sandbox.run
        sandbox.run = self.run

    def run(self, *arguments: Any, on_message: Any = lambda message: None, **rest: Any) -> Any:
        def heard(message: dict[str, Any]) -> None:
            self.peak = max(self.peak, message.get("peak_bytes", 0))
            self.cpu += message.get("cpu_seconds", 0.0)
            on_message(message)

        return self._run(*arguments, on_message=heard, **rest)

    def read(self, key: uuid.UUID) -> tuple[float, int]:
        """Read a dataset as the data worker does. Seconds, and the child's largest memory."""
        from app.datasets import ingest_task

        self.peak, began = 0, time.monotonic()
        ingest_task.read(key)
        return time.monotonic() - began, self.peak


def run(http: Any, case: Case, folder: Path, children: Children) -> Outcome:
    """One file: written, uploaded, read, and its report and its page asked for."""
    from app.kit import ids

    path = folder / "file"
    case.write(path)
    with path.open("rb") as stream:
        sent = http.post("/v1/files", files={"file": (case.filename, stream)}, data={"purpose": "fine-tune"})
    path.unlink()
    if sent.status_code != 200:
        return judge(case, sent.status_code, sent.json(), 0, 0)
    report = http.get(f"/v1/files/{sent.json()['id']}/report")
    seconds, peak = children.read(ids.parse(ids.DATASET, report.json()["dataset"]))
    report = http.get(f"/v1/files/{sent.json()['id']}/report", params={"limit": 1000})
    outcome = judge(case, report.status_code, report.json(), seconds, peak)
    if http.get(f"/v1/datasets/{report.json()['dataset']}/rows").status_code >= 500:
        outcome.faults.append("HTTP 500 for its rows")
    http.delete(f"/v1/files/{sent.json()['id']}")
    return outcome


def main() -> None:
    import httpx
    import psutil

    from benchmarks.servers import free_port, python, servers

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--table", action="store_true", help="print a line for each file, not only those that went wrong")
    parser.add_argument("--giants", action="store_true", help="the files of a gigabyte too")
    parser.add_argument("--only", default="", help="cases whose name holds this")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    chosen = [case for case in cases(with_giants=options.giants) if options.only in case.name]
    found: list[Outcome] = []
    with servers() as running, tempfile.TemporaryDirectory() as folder:
        from app.db import transaction
        from app.storage import files
        from app.web import auth

        with transaction() as session:
            _, key = auth.create_key(session, auth.first_user(session), "corpus")
        port = free_port()
        command = ["-m", "uvicorn", "app.main:create_app", "--factory", "--port", str(port), "--no-access-log", "--log-level", "warning"]
        web = python(*command, log=running.folder / "web.log", LUTHIER_LOG_LEVEL="WARNING")
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"authorization": f"Bearer {key}"}, timeout=300) as http:
            wait(http)
            http.get("/v1/files")
            process, children = psutil.Process(web.pid), Children()
            before = process.memory_info().rss
            for case in chosen:
                found.append(run(http, case, Path(folder), children))
                show(found[-1], options.table)
                if case.giant:
                    with transaction() as session:
                        files.sweep(session, older_than_seconds=0)
            after = process.memory_info().rss
        web.terminate()
        web.wait(20)
    print(summary(found, before, after))
    if options.json:
        options.json.write_text(json.dumps([outcome._asdict() | {"case": outcome.case.name} for outcome in found], indent=1))
    raise SystemExit(any(outcome.faults for outcome in found))


def wait(http: Any) -> None:
    import httpx

    for _ in range(300):
        try:
            if http.get("/healthz").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the web process did not start")


def show(outcome: Outcome, table: bool) -> None:
    if table or outcome.faults:
        line = f"{outcome.line:,}" if outcome.line else "–"
        memory = f"{outcome.bytes / 2**20:,.0f} MB" if outcome.bytes else "–"
        fault = f"  << {', '.join(outcome.faults)}" if outcome.faults else ""
        print(
            f"{outcome.case.name[:58]:58} {outcome.what:18} {line:>7} {outcome.seconds:5.1f} s {memory:>8}  {outcome.message[:110]}{fault}",
            flush=True,
        )


def summary(found: list[Outcome], before: int, after: int) -> str:
    kinds = Counter("refused" if o.what == "refused" else "error of the file" if o.what == "error" else "findings" for o in found)
    slowest, largest = max(found, key=lambda o: o.seconds), max(found, key=lambda o: o.bytes)
    return (
        f"\n{len(found)} files: {', '.join(f'{count} {kind}' for kind, count in kinds.items())}. "
        f"HTTP 5xx: {sum(o.status >= 500 for o in found)}. Promises broken: {sum(bool(o.faults) for o in found)}.\n"
        f"Slowest child {slowest.seconds:.1f} s ({slowest.case.name}); largest {largest.bytes / 2**20:,.0f} MB ({largest.case.name}).\n"
        f"Web process {before / 2**20:.0f} MB before, {after / 2**20:.0f} MB after."
    )
