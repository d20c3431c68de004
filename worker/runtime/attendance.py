"""How far each process of a job has come, so that one that ended or hangs can be named by those that wait for it.

All processes exchange something (gradients, counts, decisions) in the same order. Each counts these exchanges and writes the number
into its own place of a file in the attempt's folder before it takes part in one. Whose number is lowest is waited for. The supervisor
reads the file too, so there is no torch here.
"""

from __future__ import annotations

import os
from pathlib import Path

FILE = "processes"
WIDTH = 12
"""Bytes of a process's place: its number in decimal, and a line feed."""


class Attendance:
    """The place of the process with this rank in the file of a folder."""

    def __init__(self, folder: Path, rank: int) -> None:
        self.count, self.offset = 0, rank * WIDTH
        self.file = os.open(folder / FILE, os.O_WRONLY | os.O_CREAT, 0o644)

    def come(self) -> None:
        """Note that this process is at the next exchange. Takes microseconds: nothing waits for the disk."""
        self.count += 1
        os.pwrite(self.file, b"%*d\n" % (WIDTH - 1, self.count), self.offset)

    def close(self) -> None:
        os.close(self.file)


def counts(said: str, size: int, first: int = 0) -> list[int]:
    """The numbers of `size` processes by what the file says, from that with the rank `first` on; 0 where it has not begun."""
    places = (said[rank * WIDTH : (rank + 1) * WIDTH].strip("\0 \n") for rank in range(first, first + size))
    return [int(place) if place.isdecimal() else 0 for place in places]


def behind(numbers: list[int]) -> str:
    """Who is behind the others, as “process 1 of 2”; empty where nobody is."""
    late = [rank for rank, number in enumerate(numbers) if number < max(numbers)]
    return f"process{'es' if len(late) > 1 else ''} {', '.join(map(str, late))} of {len(numbers)}" if late else ""


def waited_for(said: str, size: int) -> str:
    """Who of `size` processes on one machine is behind the others by what the file says."""
    return behind(counts(said, size))


def read(folder: Path) -> str:
    """What the file says; empty without one."""
    try:
        return (folder / FILE).read_text(errors="replace")
    except OSError:
        return ""
