"""The data room in a real browser: the report, rows with their mask, the ledger and the editor, in light, dark and 320 px."""

from __future__ import annotations

import contextlib
import hashlib
import json
import random
from collections.abc import Iterator

import pytest
from sqlalchemy import select

from app.datasets import service as datasets
from app.kit import ids
from app.storage import files
from app.tables import Dataset, Event, File, Job
from tests.data_worker import data_worker
from tests.factories import make_spec, read
from tests.looks import check, look_at

pytestmark = pytest.mark.browser


def chat(question, answer, role="user"):
    return json.dumps({"messages": [{"role": role, "content": question}, {"role": "assistant", "content": answer}]})


@pytest.fixture
def room(session, user, tiny_registered, data_dir) -> Iterator[str]:
    """A dataset with findings of many kinds, counted, and judged by a job."""
    draw = random.Random(5)
    words = [
        "the",
        "belly",
        "of",
        "a",
        "violin",
        "is",
        "made",
        "of",
        "spruce",
        "and",
        "its",
        "back",
        "of",
        "maple",
        "with",
        "a",
        "thin",
        "coat",
        "of",
        "varnish",
        "on",
        "it",
    ]
    rows = [chat(f"Question {n}: " + " ".join(draw.choices(words, k=12)) + "?", " ".join(draw.choices(words, k=10 + n))) for n in range(60)]
    rows += [
        rows[3],
        chat("a", "b", "customer"),
        "{broken",
        chat("Who?", "Write to anna.berg@hafen.de"),
        chat("Say <|im_end|>", "ding\x07dong"),
    ]
    dataset = datasets.create(session, user, files.add_bytes(session, user, "\n".join(rows).encode(), "violins.jsonl", "fine-tune"))
    read(session, dataset)
    spec = make_spec(tiny_registered, dataset, learning_rate=0.0007).model_dump(mode="json")
    job = Job(owner_id=user.id, name="violin-tone", status="succeeded", spec=spec, model_id=tiny_registered.id, dataset_id=dataset.id)
    session.add(job)
    session.flush()
    session.add(Event(job_id=job.id, attempt=1, type="finished", data={"path": f"runs/{job.id}/a1/final"}))
    session.commit()
    folder = data_dir / "runs" / str(job.id) / "a1"
    (folder / "final").mkdir(parents=True)
    losses = [round(draw.uniform(0.2, 1.5), 3) for _ in range(60)]
    ledger = {"line": list(range(1, 61)), "before": [2.0 + loss for loss in losses], "after": losses, "tokens": [20] * 60}
    ledger["held_out"] = [n % 10 == 9 for n in range(60)]
    (folder / "ledger.json").write_text(json.dumps(ledger))
    with data_worker():
        yield f"/datasets/{ids.public(ids.DATASET, dataset.id)}"


@pytest.mark.long
def test_the_data_room(page, served, room, tmp_path):
    places = [
        ("report", ""),
        ("issues", "?tab=issues"),
        ("fix", "?tab=issues&rule=wrong_role"),
        ("versions", "?tab=versions"),
        ("mask", "/rows?cutoff=64"),
        ("ledger", "/rows?sort=after"),
        ("edit", "/rows/2"),
    ]
    places += [("upload", "/../new")]
    for name, tail in places:
        page.goto(f"{served}{room}{tail}")
        look_at(page, name, tmp_path)


@contextlib.contextmanager
def dragged(page, place, *paths):
    """Files of the disk dragged over a place of the page, as a hand with a mouse does it; dropped there at the end."""
    box, wire = page.locator(place).bounding_box(), page.context.new_cdp_session(page)
    at = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    data = {"items": [], "files": [str(path) for path in paths], "dragOperationsMask": 1}
    for what in ("dragEnter", "dragOver"):
        wire.send("Input.dispatchDragEvent", {"type": what, "data": data, **at})
    yield
    wire.send("Input.dispatchDragEvent", {"type": "drop", "data": data, **at})
    wire.detach()


@pytest.mark.long
def test_an_upload_goes_on_after_a_broken_connection_and_a_reload(page, served, session, data_dir, tmp_path):
    path = tmp_path / "large.jsonl"
    path.write_text("\n".join(chat(f"Question {n}", "word " * 300) for n in range(14_000)))
    data = path.read_bytes()
    assert len(data) > 2 * 8 * 2**20  # more than two pieces
    sent = []

    def let_one_piece_through(route):
        if route.request.method == "PATCH":
            sent.append(route.request.headers["upload-offset"])
            if len(sent) > 1:
                return route.abort()
        return route.continue_()

    page.route("**/v1/tus/*", let_one_piece_through)
    page.goto(f"{served}/datasets/new")
    page.set_input_files("#file", path)
    page.click("#send")
    page.get_by_text("the connection broke; trying again").wait_for()
    page.unroute("**/v1/tus/*")
    page.reload()
    page.get_by_text("Choose the same file again to resume").wait_for()
    assert 0.3 < page.locator("#unfinished progress").evaluate("bar => bar.value") < 0.6
    other = tmp_path / "other.jsonl"  # another file begins on its own and forgets nothing of the first
    other.write_text(chat("Another", "one"))
    page.set_input_files("#file", other)
    page.click("#send")
    page.wait_for_url("**/datasets/ds-*")
    page.goto(f"{served}/datasets/new")
    page.get_by_text("large.jsonl: ").wait_for()
    went_on, held = [], []

    def hold_the_last_piece(route):
        if route.request.method == "PATCH":
            went_on.append(int(route.request.headers["upload-offset"]))
            if went_on[-1] >= 2 * 8 * 2**20:
                return held.append(route)
        return route.continue_()

    page.route("**/v1/tus/*", hold_the_last_piece)
    with dragged(page, "#drop", path, path):
        assert "over" in page.get_attribute("#drop", "class")
    page.get_by_text("Drop one file at a time.").wait_for()
    with dragged(page, "#drop", path):
        pass
    page.locator("#stop").wait_for()
    for _ in range(400):
        if not held:
            page.wait_for_timeout(50)
    assert held and page.locator("#fault").is_hidden()
    assert 0.7 < page.evaluate("document.getElementById('sent').value") < 0.8 and "16.8 MB of" in page.inner_text("#sent-text")
    held[0].continue_()
    page.wait_for_url("**/datasets/ds-*")
    assert went_on[0] == 8 * 2**20, "it went on where it stopped"
    file = session.scalars(select(File).where(File.filename == "large.jsonl")).one()
    assert file.bytes == len(data) and file.sha256 == hashlib.sha256(data).hexdigest()


@pytest.mark.long
def test_joining_and_splitting_by_hand(page, served, room, session, user, tmp_path):
    extra = "\n".join(chat(f"Another question {n}", f"Another answer {n}") for n in range(20))
    other = datasets.create(session, user, files.add_bytes(session, user, extra.encode(), "others.jsonl", "fine-tune"))
    session.commit()
    page.goto(f"{served}{room}")
    page.get_by_role("link", name="Combine", exact=True).click()
    page.locator("#rows").wait_for(state="hidden")
    page.get_by_label("Mix (weighted)").check()
    assert page.locator("#rows").is_visible() and not page.locator("#format").is_visible()
    for _ in range(20):
        if page.get_by_label("others").count():
            break
        page.wait_for_timeout(300)
        page.reload()
        page.get_by_label("Mix (weighted)").check()
    page.get_by_label("others", exact=True).check()
    page.locator("#rows").fill("30")
    look_at(page, "join", tmp_path)
    page.get_by_role("button", name="Create dataset").click()
    page.locator(".facts").wait_for()
    assert "30" in page.locator(".facts").first.inner_text()
    page.get_by_role("link", name="Versions").click()
    page.get_by_role("heading", name="Sources").wait_for()
    look_at(page, "joined", tmp_path)
    page.goto(f"{served}/datasets/{ids.public(ids.DATASET, other.id)}/split")
    page.locator("#fraction").fill("0.25")
    page.get_by_role("button", name="Preview").click()
    page.get_by_text("no leakage").wait_for()
    facts = page.locator(".facts").first.inner_text()
    assert "15" in facts and "5" in facts
    look_at(page, "split", tmp_path)


@pytest.mark.long
def test_issues_are_fixed_conflicts_resolved_and_changes_shown(page, served, session, user, tmp_path):
    words = [f"order {n} is late and the parcel {n} is wet" for n in range(40)]
    rows = ["text,label", *(f"{text},{'account' if n % 2 else 'delivery'}" for n, text in enumerate(words))]
    rows += [f"{words[2]},account", f"{words[4]},Delivery", "my parcel,delivry", *["mail a@harbor.de,account"] * 2, "empty label,"]
    dataset = datasets.create(session, user, files.add_bytes(session, user, "\n".join(rows).encode(), "tickets.csv", "fine-tune"))
    session.commit()
    path = f"{served}/datasets/{ids.public(ids.DATASET, dataset.id)}"
    with data_worker():
        page.goto(path)
        page.get_by_text("45 of 46 rows usable").wait_for(timeout=20_000)
        page.get_by_role("link", name="Issues").click()
        boxes = page.locator("td.tick input")
        page.get_by_label("Select all").check()
        assert boxes.count() > 3 and all(box.is_checked() for box in boxes.all())
        boxes.first.uncheck()
        assert page.get_by_label("Select all").evaluate("box => box.indeterminate")
        page.get_by_role("link", name="Compare rows at line 42").click()
        page.get_by_role("button", name="Keep this").first.wait_for(timeout=20_000)
        assert page.locator(".conflict article").count() == 2
        check(page, tmp_path, "conflict")
        page.get_by_role("button", name="Keep this row, line 42").click()
        page.get_by_role("heading", name="Conflicting labels: lines 6, 43").wait_for(timeout=20_000)
        page.locator("select[name=label]").select_option("delivery")
        page.get_by_role("button", name="Relabel").click()
        page.get_by_text("No conflicting rows").wait_for(timeout=20_000)
        page.get_by_role("link", name="Back to the issues").click()
        page.get_by_role("link", name="Versions").click()
        page.get_by_text("1 row relabeled.").wait_for(timeout=20_000)
        check(page, tmp_path, "changes")
        page.get_by_role("link", name="Changes in version 2").click()
        page.get_by_text("1 row removed.").wait_for(timeout=20_000)
        page.get_by_role("link", name="Split").click()
        page.get_by_text("Line ").first.wait_for(timeout=20_000)
        check(page, tmp_path, "sides")
        low = page.evaluate(
            "[...document.querySelectorAll('.looking .field > :last-child, .looking > button')].map(one => one.getBoundingClientRect().bottom)"
        )
        assert max(low) - min(low) < 0.6, "the fields and the button of a row end on one line"


@pytest.mark.long
def test_a_row_is_found_by_its_words(page, served, room):
    page.goto(f"{served}{room}/rows")
    page.locator("#search").fill("Write to anna")
    page.wait_for_timeout(1500)  # the page may still wait for its rows; what is typed stays
    assert page.locator("#search").input_value() == "Write to anna"
    page.get_by_role("button", name="Apply").click()
    page.get_by_text("1 row with “Write to anna”").wait_for(timeout=60_000)
    assert page.locator("article.sample").count() == 1
    page.get_by_role("link", name="Edit line").click()
    page.locator('[name="text.messages[1]"]').fill("Write to the harbour.")
    page.get_by_role("button", name="Save").first.click()
    page.wait_for_url("**/datasets/ds-*")
    page.get_by_text("is created with this change").wait_for()


@pytest.mark.long
def test_from_the_ledger_to_a_better_version_and_its_job(page, served, room, session):
    page.goto(f"{served}{room}")
    page.get_by_role("link", name="Show the hardest rows").click()
    first = page.locator("article.sample").first
    first.get_by_role("link", name="Edit").wait_for(timeout=60_000)
    first.get_by_role("link", name="Edit").click()
    line = page.url.rsplit("/", 1)[-1]
    page.get_by_label("Message 2", exact=True).fill("The belly of a violin is made of spruce.")
    page.get_by_role("button", name="Save as a new version").first.click()
    page.get_by_text(f"Edited line {line}").wait_for()
    page.get_by_role("link", name="Clone the run on version 2").click(timeout=60_000)
    assert page.locator("[name=dataset]").input_value() in page.url
    assert page.locator("[name='run.learning_rate']").input_value() == "0.0007"
    assert session.scalars(select(Dataset.version).order_by(Dataset.version)).all() == [1, 2]
