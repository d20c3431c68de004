"""A question is asked once within a block, and each time outside of one."""

from __future__ import annotations

import pytest

from app.kit import once


def test_a_question_is_asked_once_within_a_block_and_not_across_blocks():
    asked = []
    say = lambda: asked.append(1) or len(asked)  # noqa: E731
    assert [once.of("a", say), once.of("a", say)] == [1, 2]
    with once.remembered():
        assert [once.of("a", say), once.of("b", say), once.of("a", say)] == [3, 4, 3]
        with once.remembered():
            assert once.of("b", say) == 4
        assert once.of("b", say) == 4, "the inner block took the outer's answers away"
    assert once.of("a", say) == 5


def test_a_fault_is_raised_each_time():
    with once.remembered():
        for _ in range(2):
            with pytest.raises(ZeroDivisionError):
                once.of("a", lambda: 1 / 0)
        assert once.of("a", lambda: None) is None and once.of("a", lambda: 2) is None, "None is an answer too"
