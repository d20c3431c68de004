"""The corpus of malformed files: read by the real code under the real limits, and a part of it through the whole studio."""

import json
import time

import pytest

from app.errors import StudioError
from app.kit import sandbox
from tests.datasets import malformed
from tests.datasets.malformed_run import Children, judge, run

BATCHES = 2


@pytest.fixture(scope="module")
def every() -> dict[str, malformed.Case]:
    """Made once, and not where tests are only collected: to make them takes seconds, and they are large."""
    return {case.name: case for case in malformed.cases()}


def read_many(payload, say):
    """In a child: many files, one after the other, each as `app.datasets.ingest.read` reads it, with what the studio would answer."""
    from pathlib import Path

    from app.datasets import ingest, readers

    folder, outcomes = Path(payload["folder"]), []
    chosen = set(payload["names"])
    for case in (case for case in malformed.cases() if case.name in chosen):
        path, findings = folder / "file", []
        case.write(path)
        began = time.monotonic()
        try:
            if path.stat().st_size == 0:
                raise StudioError("The file is empty.")
            readers.kind_of(case.filename)
            status = 200
        except StudioError as error:
            outcomes.append({"name": case.name, "status": 400, "answer": {"error": {"message": str(error)}}, "seconds": 0.0})
            continue
        try:
            result = ingest.read(
                {"path": str(path), "filename": case.filename, "rows": str(folder / "rows")},
                lambda message, found=findings: found.append(message["finding"]) if "finding" in message else None,
            )
            answer = {"status": "ready", "findings": findings[:1000], "good_rows": result["good_rows"]}
        except StudioError as error:
            answer = {
                "status": "error",
                "error": {"message": error.message, "hint": error.hint, "file": case.filename, **error.details},
            }
        outcomes.append({"name": case.name, "status": status, "answer": answer, "seconds": time.monotonic() - began})
    for outcome in outcomes:
        say({"outcome": outcome})
    return len(outcomes)


@pytest.mark.long
def test_there_are_enough_of_them_and_each_has_a_name_of_its_own():
    names = [case.name for case in malformed.cases(with_giants=True)]
    assert len(names) == len(set(names)) >= 200


@pytest.mark.long
@pytest.mark.parametrize("batch", range(BATCHES))
def test_each_says_what_is_wrong_where_and_what_to_do(tmp_path, every, batch):
    said = []
    names = list(every)[batch::BATCHES]
    count = sandbox.run(
        "tests.datasets.test_malformed:read_many",
        {"names": names, "folder": str(tmp_path)},
        folder=tmp_path,
        write=[tmp_path],
        on_message=lambda message: said.append(message),
    )
    outcomes = [message["outcome"] for message in said if "outcome" in message]
    assert count == len(outcomes) == len(names)
    faults = {o["name"]: found for o in outcomes if (found := judge(every[o["name"]], o["status"], o["answer"], o["seconds"], 0).faults)}
    assert not faults, json.dumps(faults, indent=1, ensure_ascii=False)
    assert max(message.get("peak_bytes", 0) for message in said) < malformed.MAX_BYTES


THROUGH = (
    "cut off / line.jsonl", "a NUL in a text / line.jsonl", "100,000 brackets / line.jsonl", "utf-16 / x.csv", "a million columns / x.csv",
    "a password / x.zip", "a bomb of 256 MB / x.zip", "a dictionary bomb of 40 GB / x.parquet", "bot and customer / chat.jsonl", "zeros / x.jsonl",
    "nothing at all / x.csv", "a name no reader takes / x.exe", "perhaps / rated.jsonl",
)  # fmt: skip


@pytest.fixture
def children(monkeypatch):
    monkeypatch.setattr(sandbox, "run", sandbox.run)  # put back what Children replaces
    return Children()


@pytest.mark.long
def test_a_part_of_them_through_the_whole_studio(api, session, tmp_path, children, every):
    outcomes = [run(api, every[name], tmp_path, children) for name in THROUGH]
    faults = {outcome.case.name: outcome.faults for outcome in outcomes if outcome.faults}
    assert not faults, json.dumps(faults, indent=1, ensure_ascii=False)


def test_the_judge_finds_what_is_wrong():
    """The tests above would pass with a judge that never objects."""
    case = malformed.Case("a case / x.jsonl", b"", "ragged", 3)
    finding = {"rule": "ragged", "line": 4, "message": "It is so. Do that.", "fix": None, "severity": "error"}
    good = {"status": "ready", "findings": [{**finding, "line": 3}], "good_rows": 2}
    assert judge(case, 200, good, 1.0, 0).faults == []
    assert judge(case, 200, {**good, "findings": [finding]}, 1.0, 0).faults == ["line 4, not 3"]
    assert judge(case, 200, good, 11.0, 3 << 30).faults == ["11.0 s", "3,072 MB"]
    assert judge(case, 500, {"error": {}}, 1.0, 0).faults[0] == "HTTP 500"
    assert judge(case, 200, {"status": "error", "error": {"message": "Broken."}}, 1.0, 0).faults[:2] == ["no file or no line", "no fix"]
    vague = {**finding, "line": 3, "message": "It is so."}
    assert judge(case, 200, {**good, "findings": [vague]}, 1.0, 0).faults == ["ragged without a fix"]
