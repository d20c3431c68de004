"""Names that climb out, in every text of every request (S4): no answer holds bytes from outside, and no file appears or changes there.

After MLflow CVE-2026-2614 and its family, Gradio CVE-2026-28414 and Ollama CVE-2024-37032. The requests are those of `tests/fuzz`."""

from __future__ import annotations

import asyncio
import base64
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from urllib.parse import quote

import pytest

from tests.fuzz.asgi import ask
from tests.fuzz.mutate import Parts, _places, _set_form, _set_json, _set_param, _set_query, raw
from tests.fuzz.run import Case, Fuzz
from tests.generating import _workers, answering_dir, generate_worker  # noqa: F401
from tests.security.test_fuzz import fuzz  # noqa: F401  # a fixture

MARK = "canary-outside-of-the-studio"
CLIMBS = (
    "../" * 1,
    "../" * 2,
    "../" * 8,
    "..\\" * 3,
    "....//" * 4,
    "..;/" * 4,
    "%2e%2e%2f" * 4,
    "%252e%252e%252f" * 4,
    "..%c0%af" * 4,
    "..\uff0f" * 4,
)
FRAMES = (
    "{}",
    "/{}",
    "./{}",
    "a/{}",
    "file://{}",
    "file:///{}",
    "C:\\{}",
    "\\\\?\\{}",
    "{}\0",
    "{}\0.jsonl",
    "{} ",
    "{}.",
    "~/{}",
    "{}/",
    "{}#.json",
    "{}?x=.csv",
)


def corpus(outside: Path) -> list[str]:
    """Spellings of a file that no request may reach: relative to several folders, absolute, and through a link within the studio."""
    names = [f"{climb}{outside.parent.name}/{outside.name}" for climb in CLIMBS] + [str(outside), str(outside).lstrip("/"), "linked"]
    return [frame.format(name) for name in names for frame in FRAMES]


def ways(parts: Parts) -> list[Callable[[str, Parts], Parts]]:
    """One for each place of a request that holds a text."""
    texts = [place for place, (holder, key) in enumerate(_places(parts.json)) if isinstance(holder[key], str)]
    found: list[Callable[[str, Parts], Parts]] = [lambda text, whole, at=place: _set_json(at, text, whole) for place in texts]
    found += [partial(lambda name, text, whole: _set_form(name, text, whole), name) for name, _ in parts.form or ()]
    found += [
        partial(lambda name, text, whole: _set_query(name, text, whole), name)
        for name in {*parts.known_query, *(n for n, _ in parts.query)}
    ]
    found += [partial(lambda name, text, whole: _set_param(name, text, whole), name) for name in parts.params]
    for place in range(len(parts.multipart or ())):
        found.append(partial(_set_filename, place))
    if any(name == b"upload-metadata" for name, _ in parts.headers):
        found.append(_set_metadata)
    return found


def _set_filename(place: int, text: str, parts: Parts) -> Parts:
    sent = list(parts.multipart or ())
    sent[place] = (sent[place][0], text.replace('"', "%22"), sent[place][2])
    return replace(parts, multipart=sent)


def _set_metadata(text: str, parts: Parts) -> Parts:
    told = b"filename " + base64.b64encode(text.encode("utf-8", "surrogatepass"))
    return replace(parts, headers=[*(one for one in parts.headers if one[0] != b"upload-metadata"), (b"upload-metadata", told)])


def tree(folder: Path, without: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file below a folder that is not below `without`."""
    found = {}
    for path in folder.rglob("*"):
        if without not in (path, *path.parents) and path.is_file():
            found[str(path)] = (path.stat().st_size, path.stat().st_mtime_ns)
    return found


def requests_of(fuzz: Fuzz, spellings: list[str], draw: random.Random, each: int, share: float) -> Iterator[tuple[Case, str, Parts]]:  # noqa: F811
    """So many spellings in each place of each request, of which a share is drawn."""
    for case in fuzz.cases:
        parts = fuzz.parts(case)
        for way in (one for one in ways(parts) if draw.random() < share):
            for text in draw.sample(spellings, each):
                yield case, text, way(text, parts)


@pytest.mark.long
@pytest.mark.parametrize(("each", "share"), [(1, 0.25), pytest.param(20, 1.0, marks=[pytest.mark.fault, pytest.mark.timeout(1800)])])
def test_no_name_reaches_a_file_outside_of_the_studio(fuzz, data_dir, tmp_path, each, share):  # noqa: F811
    outside = tmp_path / "outside" / "canary.jsonl"
    outside.parent.mkdir()
    outside.write_text(f'{{"prompt": "{MARK}", "completion": "{MARK}"}}\n' * 9)
    for folder in ("import", "blobs", "models", "tmp"):
        (data_dir / folder).mkdir(exist_ok=True)
        (data_dir / folder / "linked").symlink_to(outside.parent)
    spellings, before, draw = corpus(outside), tree(tmp_path, data_dir), random.Random(each)
    assert len(spellings) >= 200

    async def all_of_it() -> tuple[int, list[str]]:
        count, wrong = 0, []
        for case, text, parts in requests_of(fuzz, spellings, draw, each, share):
            answer = await ask(fuzz.app, raw(parts, fuzz.door(case)))
            count += 1
            if MARK in answer.text or MARK in str(answer.headers):
                wrong.append(f"{case.name} shows what is outside, for {text!r}: {answer.status} {answer.text[:300]}")
            if count % 300 == 0:
                fuzz.world.prune_keys()
        return count, wrong

    count, wrong = asyncio.run(all_of_it())
    assert not wrong, "\n".join(wrong[:20])
    assert tree(tmp_path, data_dir) == before, "a file outside of the data folder was made or changed"
    assert count > 500 * each * share, count


def test_what_is_outside_would_be_seen(tmp_path):
    """The corpus does reach the file where names are joined without a check, and the tree sees what is written there."""
    outside, studio = tmp_path / "outside" / "canary.jsonl", tmp_path / "data" / "blobs"
    outside.parent.mkdir()
    studio.mkdir(parents=True)
    outside.write_text(MARK)
    before = tree(tmp_path, tmp_path / "data")
    reached = [text for text in corpus(outside) if "\0" not in text and (studio / text).resolve() == outside]
    assert len(reached) >= 5 and quote(reached[0])
    (studio / reached[0]).resolve().write_text("changed")
    assert tree(tmp_path, tmp_path / "data") != before
