"""What a job needs of a machine, what a worker's machine has, and whether the two match.

`app/evaluation/claims.py` asks the same in SQL, for every job that waits at once; a test compares the two.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from app.kit.humanize import human_bytes, human_number
from app.languages import gettext, ngettext
from app.machines.gpus import GpuCard
from app.machines.hardware import Machine

NAMED = 3
"""Machines that a sentence names."""
LABEL = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$"

Label = Annotated[str, StringConstraints(pattern=LABEL)]


class Resources(BaseModel):
    """What a request asks of the machine, beyond what its estimate says."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    gpus: int | None = Field(None, ge=1, le=64, description="GPUs of one machine that train the job together, each with a process.")
    machines: int | None = Field(
        None,
        ge=1,
        le=64,
        description="Machines that train the job together, each with as many GPUs, or on its CPU. None begins without the others.",
    )
    gpu: Annotated[str, StringConstraints(min_length=1, max_length=80)] | None = Field(
        None, description="Part of the name of the GPU, such as H100; upper and lower case are the same."
    )
    gpu_memory_bytes: int | None = Field(None, ge=1, le=2**50, description="Memory of each GPU, where the estimate says too little.")
    labels: tuple[Label, ...] = Field((), max_length=8, description="Labels that the worker has, all of them (LUTHIER_LABELS).")

    @property
    def on_gpu(self) -> bool:
        """Whether only a machine with a GPU will do."""
        return (self.gpus, self.gpu, self.gpu_memory_bytes) != (None, None, None)


@dataclass(frozen=True, slots=True)
class Needs:
    """What a job needs. `gpu_bytes` is the memory of each GPU, `cpu_bytes` that of the machine for each process where it trains on the CPU;
    0 where nothing is known, None where it does not train there. Without `num_gpus` it takes as many as the worker's jobs usually do."""

    gpu_bytes: int | None = 0
    cpu_bytes: int | None = 0
    num_gpus: int | None = None
    gpu_type: str | None = None
    labels: tuple[str, ...] = ()
    num_machines: int = 1
    """Each of which has all of this."""

    def suits(self, card: GpuKind | GpuCard) -> bool:
        """Whether this GPU may be one of the job's."""
        named = self.gpu_type is None or self.gpu_type.lower() in card.name.lower()
        return self.gpu_bytes is not None and self.gpu_bytes <= card.memory_bytes and named

    def in_words(self, processes: int = 1) -> str:
        """`a GPU H100 with 42.1 GB, and the label a`."""
        if self.gpu_bytes is None:
            what = gettext("%(size)s of memory", size=human_bytes((self.cpu_bytes or 0) * processes))
        else:
            what = self._gpus_in_words(self.num_gpus or processes)
            if self.cpu_bytes:
                size = human_bytes(self.cpu_bytes * processes)
                what = gettext("%(gpus)s, or %(size)s of memory without a GPU", gpus=what, size=size)
            elif self.cpu_bytes is not None:
                what = gettext("%(gpus)s, or a CPU", gpus=what)
        if self.num_machines > 1:
            what = gettext("%(num)s machines, each with %(machine)s", num=human_number(self.num_machines), machine=what)
        if self.labels:
            labels = reduce(lambda first, second: gettext("%(first)s and %(second)s", first=first, second=second), self.labels)
            what = ngettext(
                "%(machine)s, and the label %(labels)s",
                "%(machine)s, and the labels %(labels)s",
                len(self.labels),
                machine=what,
                labels=labels,
            )
        return what

    def _gpus_in_words(self, count: int) -> str:
        told = {"name": self.gpu_type, "size": human_bytes(self.gpu_bytes)}
        if self.gpu_type and self.gpu_bytes:
            return ngettext("a GPU %(name)s with %(size)s", "%(num)s GPUs %(name)s of one machine with %(size)s each", count, **told)
        if self.gpu_bytes:
            return ngettext("a GPU with %(size)s", "%(num)s GPUs of one machine with %(size)s each", count, **told)
        if self.gpu_type:
            return ngettext("a GPU %(name)s", "%(num)s GPUs %(name)s of one machine", count, **told)
        return ngettext("a GPU", "%(num)s GPUs of one machine", count)


class GpuKind(NamedTuple):
    """A GPU, as far as a job asks."""

    memory_bytes: int
    name: str


@dataclass(frozen=True, slots=True)
class Capacity:
    """What a worker's machine has, or what is free of it. `cards` are the GPUs that the worker may use; without any it trains on the CPU.
    `processes` is how many train one job together where it does not say."""

    host: str
    cards: tuple[GpuKind, ...] = ()
    memory_bytes: int = 0
    labels: tuple[str, ...] = ()
    processes: int = 1
    cuda: bool = False
    """The machine has GPUs, whether or not any of them is among `cards`: then only what asks for the CPU trains on it."""

    def fits(self, needs: Needs) -> bool:
        if not set(needs.labels) <= set(self.labels):
            return False
        if self.cuda and needs.gpu_bytes is not None:
            return sum(map(needs.suits, self.cards)) >= (needs.num_gpus or self.processes)
        return needs.cpu_bytes is not None and needs.cpu_bytes * self.processes <= self.memory_bytes

    def without_cards_for(self, needs: Needs) -> Capacity:
        """What is left where the GPUs that suit a job are kept for it."""
        return replace(self, cards=tuple(card for card in self.cards if not needs.suits(card)))

    def in_words(self) -> str:
        """`far: 2 × Tesla T4 (16 GB)`."""
        kinds = Counter(self.cards)
        cards = ", ".join(f"{count} × {card.name} ({human_bytes(card.memory_bytes)})" for card, count in kinds.items())
        labels = f" [{', '.join(self.labels)}]" if self.labels else ""
        return f"{self.host}{labels}: {cards or f'CPU, {human_bytes(self.memory_bytes)}'}"


def kinds_of(cards: Iterable[GpuCard]) -> tuple[GpuKind, ...]:
    return tuple(GpuKind(card.memory_bytes, card.name) for card in cards)


def capacity_of(host: str, machine: Machine) -> Capacity:
    """All that a machine has, as its workers tell it."""
    cards = kinds_of(machine.cards)
    if machine.gpu_memory_bytes is not None and not cards:  # told by a worker of an earlier version
        cards = (GpuKind(machine.gpu_memory_bytes, machine.gpu_name or ""),) * machine.processes
    return Capacity(host, cards, machine.memory_bytes, machine.labels, machine.processes, machine.cuda)


def why_nowhere(needs: Needs, known: Collection[Capacity]) -> str | None:
    """Why none of these machines can ever take the job; None where one can, and where no machine is known. A machine may have several workers, of
    which each takes a place of a job on several."""
    if not known or any(one.fits(needs) for one in known):
        return None
    there = [one.in_words() for one in known]
    named = "; ".join(there[:NAMED])
    if len(there) > NAMED:
        named = gettext("%(machines)s; and %(num)s more", machines=named, num=human_number(len(there) - NAMED))
    wanted = needs.in_words(min(one.processes for one in known))
    return gettext("No train worker can take it: it needs %(wanted)s. There is %(machines)s.", wanted=wanted, machines=named)


def matching(machines: Iterable[Machine], asked: Resources | None, device: str) -> list[Machine]:
    """The machines that may take what asks for this, by all but its memory: those with a GPU where one is asked for."""
    wanted = asked or Resources()
    needs = Needs(
        gpu_bytes=None if device == "cpu" else wanted.gpu_memory_bytes or 0,
        cpu_bytes=None if device == "cuda" or wanted.on_gpu else 0,
        num_gpus=wanted.gpus,
        gpu_type=wanted.gpu,
        labels=wanted.labels,
    )
    return [one for one in machines if capacity_of("", one).fits(needs)]


def weakest(machines: Sequence[Machine]) -> list[Machine]:
    """From the one that holds least to the one that holds most."""
    return sorted(machines, key=lambda one: (one.cuda, one.training_memory_bytes))
