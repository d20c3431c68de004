"""The end of a log is found wherever a rotation has left it."""

from __future__ import annotations

import pytest

from app.kit import logs
from worker.supervision import exit_codes


def test_the_last_words_are_found_after_a_rotation(tmp_path):
    log = tmp_path / "trainer.log"
    log.write_text("".join(f"line {n}\n" for n in range(2000)) + "the reason is here\n")
    logs.turn_over(log, 5000)
    assert not log.stat().st_size, "nothing was rotated"
    assert exit_codes.tail(log).endswith("line 1999\nthe reason is here\n")
    with log.open("a") as more:
        more.write("and the last word\n")
    said = exit_codes.tail(log, 60)
    assert said.endswith("the reason is here\nand the last word\n") and said.startswith("line 199") and len(said) <= 60


@pytest.mark.parametrize(("size", "most", "expected"), [(0, 10, ""), (5, 10, "aaaa\n"), (10, 10, "aaaa\naaaa\n"), (50, 10, "aaaa\n")])
def test_a_tail_is_whole_lines(tmp_path, size, most, expected):
    log = tmp_path / "trainer.log"
    log.write_text("aaaa\n" * (size // 5))
    assert exit_codes.tail(log, most) == expected


def test_no_link_and_no_missing_file_is_read(tmp_path):
    (tmp_path / "secret").write_text("secret\n")
    (tmp_path / "trainer.log").symlink_to(tmp_path / "secret")
    assert exit_codes.tail(tmp_path / "trainer.log") == "" == exit_codes.tail(tmp_path / "nothing.log")


def test_a_log_that_grows_while_it_is_copied_keeps_its_last_line(tmp_path, monkeypatch):
    """The writer adds three limits' worth and its last words between the look at the size and the copy."""
    log = tmp_path / "trainer.log"
    log.write_text("old\n" * 101)
    looks = iter([True])
    real = logs.os.fstat

    def fstat(number):
        seen = real(number)
        if next(looks, False):
            with log.open("a") as writer:
                writer.write("new\n" * 300 + "the last words\n")
        return seen

    monkeypatch.setattr(logs.os, "fstat", fstat)
    logs.turn_over(log, 400)
    kept = logs.turned_over(log)
    assert kept.read_text().endswith("the last words\n") and kept.stat().st_size <= 800 and not log.stat().st_size
