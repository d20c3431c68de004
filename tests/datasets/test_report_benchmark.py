"""The data room's benchmarks run to their end, small, and print what they promise."""

import json
import subprocess
import sys

import pytest

from app.settings import PROJECT


def run(*arguments, tmp_path):
    out = tmp_path / "result.json"
    done = subprocess.run([sys.executable, "-m", *arguments, "--json", str(out)], cwd=PROJECT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text()), done.stdout


@pytest.mark.long
def test_the_report(tmp_path):
    result, said = run("benchmarks.report", "--rows", "400", "--requests", "4", tmp_path=tmp_path)
    assert 300 < result["good_rows"] < 400 and result["tokens"] > 10_000 and result["child_mb"] > 20
    assert {"personal_data", "empty_answer", "duplicate", "template_marker", "control_character", "over_long"} <= result["rules"].keys()
    assert all(0 < page["p50"] <= page["p95"] for page in result["pages"].values()) and "reached" in said


@pytest.mark.long
def test_the_upload(tmp_path):
    result, said = run("benchmarks.upload", "--bytes", "9000000", "--breaks", "3", tmp_path=tmp_path)
    assert [found["bytes"] for found in result.values()] == ["sha256 equal"] * 3, said
    assert all(found["web_grew_mb"] < 64 for found in result.values())
