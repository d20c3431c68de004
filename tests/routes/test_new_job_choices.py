"""The form of a new job and the API's list of strategies, where the data has a say: what is advised, and rows to check with."""

from __future__ import annotations

import html
import re

import pytest

from app.evaluation import advice
from app.jobs import request as job_request
from app.jobs import service as jobs
from app.kit import ids
from app.machines.hardware import this_machine
from app.spec import JobSpec
from app.strategies import STRATEGIES
from tests.factories import upload


def public(dataset) -> str:
    return ids.public(ids.DATASET, dataset.id)


@pytest.fixture
def kinds(session, user, data_dir):
    return upload(session, user, [{"text": f"text number {n} about things", "label": "abc"[n % 3]} for n in range(60)], "kinds.jsonl")


@pytest.fixture
def more_kinds(session, user, data_dir):
    return upload(session, user, [{"text": f"another text {n}", "label": "abc"[n % 3]} for n in range(12)], "more-kinds.jsonl")


@pytest.fixture
def chats(session, user, data_dir):
    return upload(session, user, [{"prompt": f"{n}?", "completion": "Yes. " * 9} for n in range(60)], "chats.jsonl")


def test_the_advised_strategy_is_marked_and_chosen_where_none_was_named(client, session, user, tiny_registered, kinds, chats):
    for data in (kinds, chats):
        first = next(a.strategy for a in advice.advise(session, user, "tiny", data).ranking if a.advised)
        page = client.get("/jobs/new", params={"model": "tiny", "dataset": public(data)}).text
        card = re.search(rf'value="{first}" checked.*?</label>', page, re.S)
        assert card and 'class="pill ok">Recommended' in card.group(0) and page.count('class="pill ok">Recommended') == 1


def test_rows_to_check_with_can_come_from_another_dataset(client, session, user, tiny_registered, kinds, more_kinds, chats):
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "dense_head"}
    page = client.get("/jobs/new", params=asked)
    choices = re.search(r'<select id="validation".*?</select>', page.text, re.S).group(0)
    assert public(more_kinds) in choices and public(chats) not in choices and public(kinds) not in choices
    assert 'name="split.method"' in page.text
    chosen = client.get("/jobs/new", params={**asked, "validation": public(more_kinds)})
    assert 'name="split.method"' not in chosen.text and f"/datasets/{public(kinds)}/split" in chosen.text
    assert f"validation_dataset_id: {public(more_kinds)}" in html.unescape(chosen.text)
    answer = client.post("/jobs", data={**asked, "validation": public(more_kinds), "split.method": "stratified"}, follow_redirects=False)
    assert answer.status_code == 303, answer.text
    (job,) = jobs.list_(session, user)
    assert job.validation_dataset_id == more_kinds.id and job.spec["validation"]["rows"] == 12 and "split" not in job.spec
    clone = client.get(f"/jobs/new?clone={ids.public(ids.JOB, job.id)}")
    assert re.search(rf'value="{public(more_kinds)}" selected', clone.text)


def test_labels_that_cannot_be_checked_stand_beside_the_choice(client, session, user, tiny_registered, kinds):
    odd = upload(session, user, [{"text": f"text {n}", "label": "ax"[n % 2]} for n in range(8)], "odd.jsonl")
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "dense_head", "validation": public(odd)}
    page = client.post("/jobs", data=asked)
    assert page.status_code == 400 and jobs.list_(session, user) == []
    place = re.search(r'id="validation-error">(.*?)</p>', page.text, re.S).group(1)
    assert "1 label of the validation dataset odd is in no training row: “x”." in html.unescape(place)


def test_a_choice_of_another_kind_is_forgotten_and_one_that_is_gone_is_told(client, tiny_registered, kinds, chats):
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "dense_head"}
    assert re.search(r"\bfault\b", client.get("/jobs/new", params={**asked, "validation": public(chats)}).text) is None
    gone = client.get("/jobs/new", params={**asked, "validation": "ds-" + "0" * 32})
    assert "There is no dataset ds-0000" in gone.text and "disabled>Start" in gone.text


def test_strategies_say_what_this_data_means_for_them(api, session, user, tiny_registered, kinds, chats):
    found = {s["name"]: s for s in api.get("/v1/strategies", params={"model": "tiny", "dataset": public(kinds)}).json()["data"]}
    assert set(found) == set(STRATEGIES) and [s["advised"] for s in found.values()].count(True) == 1
    for name, strategy in found.items():
        able = "classification" in STRATEGIES[name].tasks
        assert able or (not strategy["available"] and "classification" in strategy["reason"])
        assert not strategy["available"] or strategy["cost"]["memory_bytes"] > 0
    other = {s["name"]: s for s in api.get("/v1/strategies", params={"model": "tiny", "dataset": public(chats)}).json()["data"]}
    assert not other["feature_extraction"]["available"] and found["feature_extraction"]["available"]
    plain = api.get("/v1/strategies").json()["data"]
    assert all("advised" not in s for s in plain)
    assert api.get("/v1/strategies", params={"model": "tiny", "dataset": "ds-" + "0" * 32}).status_code == 404


def test_a_strategy_too_large_for_the_machine_says_so(api, session, user, tiny_registered, chats, monkeypatch):
    from app.machines import heartbeats

    small = this_machine().model_copy(update={"memory_bytes": 200 * 2**20})
    monkeypatch.setattr(heartbeats, "training_machines", lambda *_: [small])
    found = api.get("/v1/strategies", params={"model": "tiny", "dataset": public(chats)}).json()["data"]
    full = next(s for s in found if s["name"] == "full")
    assert not full["available"] and "this machine has 0.2 GB" in full["reason"]


def started(session, user, answer):
    assert answer.status_code == 303, answer.text
    return jobs.get(session, user, ids.parse(ids.JOB, answer.headers["location"].rpartition("/")[2]))


def test_settings_that_were_not_shown_are_refused_and_nothing_typed_is_lost(client, session, user, tiny_registered, kinds, chats):
    sent = {"model": "tiny", "dataset": public(chats), "strategy": "dora", "shown": "lora", "run.epochs": "7", "name": "mine"}
    page = client.post("/jobs", data=sent)
    assert page.status_code == 409 and jobs.list_(session, user) == []
    said = html.unescape(page.text)
    assert "You chose DoRA, and the page still showed the settings of LoRA, so nothing was started." in said
    assert re.search(r'id="method-dora"[^>]* checked', said) and 'id="shown" name="shown" value="dora"' in said
    assert re.search(r'name="run\.epochs"[^>]*value="7"', said) and 'value="mine"' in said
    assert (
        started(session, user, client.post("/jobs", data=sent | {"shown": "dora"}, follow_redirects=False)).spec["strategy"]["name"]
        == "dora"
    )
    moved = client.post("/jobs", data=sent | {"shown": "dora", "dataset": public(kinds), "task": "generation"})
    assert moved.status_code == 409 and "which is for another task" in moved.text
    gone = client.post("/jobs", data=sent | {"shown": "", "strategy": "magic"})
    assert gone.status_code in (400, 409) and "There is no method magic." in gone.text


def test_the_address_opens_the_same_form(client, session, user, tiny_registered, chats):
    typed = {
        "model": "tiny",
        "dataset": public(chats),
        "strategy": "full",
        "shown": "lora",
        "strategy.rank": "24",
        "run.epochs": "7",
        "run.seed": "42",
    }
    address = client.get("/jobs/new", params=typed, headers={"hx-request": "true"}).headers["hx-replace-url"]
    assert "strategy=full" in address and "kept.rank=24" in address and "run.epochs=7" in address and "seed" not in address
    assert "hx-replace-url" not in client.get(address).headers
    assert client.get(address, headers={"hx-request": "true"}).headers["hx-replace-url"] == address


def test_what_is_wrong_stands_at_its_field_and_the_summary_leads_there(client, tiny_registered, kinds):
    """Also what only the whole job shows to be wrong: the 8-bit optimizer without a GPU."""
    page = client.get(
        "/jobs/new", params={"model": "tiny", "dataset": public(kinds), "strategy": "dense_head", "run.optimizer": "adamw_8bit"}
    ).text
    field = re.search(r'<div class="field wrong">\s*<label for="run-optimizer">.*?</div>', page, re.S).group(0)
    assert 'aria-describedby="run-optimizer-help run-optimizer-error"' in field and 'aria-invalid="true"' in field
    assert "The 8-bit optimizer adamw_8bit needs an NVIDIA GPU" in field
    assert re.search(r'<a class="fault" href="#run-optimizer">The 8-bit optimizer', page[page.index('id="before"') :])


def test_a_preset_sets_settings_and_each_says_its_time(client, api, session, user, tiny_registered, chats):
    asked = {"model": "tiny", "dataset": public(chats), "strategy": "lora"}
    page = html.unescape(client.get("/jobs/new", params=asked).text)
    cards = re.findall(r'id="preset-(\w+)".*?<b>([^<]+)</b>, (\d+) steps', page, re.S)
    assert [name for name, _, _ in cards] == ["quick", "balanced", "best"] and 'value="balanced" checked' in page
    quick, balanced, best = (int(steps) for _, _, steps in cards)
    assert 20 <= quick <= 30 and 50 <= balanced <= 100 and 120 <= best <= 250
    job = started(session, user, client.post("/jobs", data={**asked, "preset": "best", "run.epochs": "2"}, follow_redirects=False))
    assert job.order["preset"] == "best" and job.order["run"] == {"epochs": 2.0}
    assert (job.spec["run"]["epochs"], job.spec["run"]["early_stopping_patience"]) == (2, 5), "what is explicit goes before the preset"
    body = {"model": "tiny", "dataset_id": public(chats), "strategy": {"name": "lora"}, "preset": "quick"}
    made = api.post("/v1/fine_tuning/jobs", json=body).json()
    assert made["run"]["max_steps"] == 25 and made["estimate"]["steps"] == quick and made["run"]["learning_rate"] == 5e-4
    wrong = api.post("/v1/fine_tuning/jobs", json=body | {"preset": "slow"})
    assert wrong.status_code == 400 and wrong.json()["error"]["param"] == "preset"
    assert "There is no preset slow" in client.get("/jobs/new", params={**asked, "preset": "slow"}).text


def test_the_pair_used_last_is_chosen_and_the_model_suits_the_task(client, session, user, tiny_registered, kinds, chats):
    from app.jobs.preselection import pair
    from app.tables import Model

    both = [session.get_one(Model, tiny_registered.id)]
    assert pair(session, user, both, [chats, kinds], None, None) == (both[0], chats), "nothing was used yet"
    jobs.create(session, user, job_request.read_order({"model": "tiny", "dataset_id": public(kinds), "strategy": {"name": "dense_head"}}))
    session.commit()
    encoder = Model(name="mini", title="Mini", kind="encoder")
    assert pair(session, user, [*both, encoder], [], None, None)[0] is both[0], "for text a model that writes"
    newest = upload(session, user, [{"prompt": f"{n}!", "completion": "No."} for n in range(20)], "newest.jsonl")
    assert pair(session, user, both, [newest, chats, kinds], None, None) == (both[0], kinds)
    page = client.get("/jobs/new").text
    assert re.search(rf'value="{public(kinds)}" selected', page)


def test_presets_are_offered_where_they_differ(client, tiny_registered, kinds):
    asked = {"model": "tiny", "dataset": public(kinds), "preset": "quick"}
    alike = client.get("/jobs/new", params={**asked, "strategy": "feature_extraction"}).text
    assert "every preset is the same" in alike and 'id="preset-best"' not in alike
    assert '<input type="hidden" name="preset" value="quick">' in alike, "another method goes on with what was chosen"
    assert 'id="preset-best"' in client.get("/jobs/new", params={**asked, "strategy": "dense_head"}).text


def test_a_method_shows_the_settings_it_uses(client, api, tiny_registered, kinds):
    asked = {"model": "tiny", "dataset": public(kinds), "strategy": "feature_extraction"}

    def settings(**more: str) -> set[str]:
        return set(re.findall(r'name="((?:strategy|run)\.\w+)"', client.get("/jobs/new", params={**asked, **more}).text))

    fitted, dense = settings(), settings(**{"strategy.classifier": "dense"})
    assert {"strategy.classifier", "strategy.pooling", "strategy.regularisation", "run.max_length", "run.seed"} <= fitted
    assert not fitted & {"strategy.width", "strategy.passes", "run.epochs", "run.learning_rate", "run.optimizer", "run.packing"}
    assert dense - fitted >= {"strategy.width", "strategy.passes", "run.learning_rate", "run.optimizer"}
    assert "strategy.regularisation" not in dense and "run.epochs" not in dense
    other = settings(strategy="dense_head")
    assert {"strategy.width", "run.epochs", "run.batch_size"} <= other

    changed = {**asked, "strategy.width": "32"}
    page = html.unescape(client.get("/jobs/new", params=changed).text)
    assert 'value="32"' in page and "width means nothing with the other settings" in page, "what was chosen is seen, and refused there"
    order = {"model": "tiny", "dataset_id": public(kinds), "strategy": {"name": "feature_extraction", "width": 32}}
    refused = api.post("/v1/fine_tuning/jobs", json=order)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "strategy.width"
    order["strategy"]["classifier"] = "dense"
    assert api.post("/v1/fine_tuning/jobs", json=order).status_code == 200


def test_no_form_begins_with_data_that_nothing_can_be_done_with(client, session, user, tiny_registered, kinds, chats):
    from app.jobs.preselection import pair

    rated = upload(session, user, [{"prompt": f"{n}?", "completion": "No.", "label": n % 2 == 0} for n in range(20)], "rated.jsonl")
    bare = upload(session, user, [{"messages": []}, {"messages": []}], "bare.jsonl")
    assert rated.format == "rated" and bare.good_rows == 0
    assert pair(session, user, [tiny_registered], [bare, rated, chats], None, None)[1] is rated
    assert pair(session, user, [tiny_registered], [bare], None, None)[1] is bare, "where there is no other, the form says why"
    assert re.search(rf'value="({"|".join(map(public, (kinds, chats, rated)))})" selected', client.get("/jobs/new").text)
    for path in ("/playground/prompts", "/playground/vectors", "/evaluations", "/datasets/combine"):
        assert public(bare) not in client.get(path).text, path
    assert f"/jobs/new?dataset={public(rated)}" in client.get(f"/datasets/{public(rated)}").text


def test_text_begins_with_a_base_model(session, user, tiny_registered):
    from app.jobs.preselection import pair
    from app.tables import Model

    base = Model(name="plain", title="Plain", kind="generic", kept=True)
    text = upload(session, user, [{"text": f"Note {n} of the workshop."} for n in range(20)], "notes.jsonl")
    assert text.format == "plain_text" and pair(session, user, [tiny_registered, base], [text], None, None)[0] is base


def test_a_jobs_file_gives_the_same_job_again(client, session, user, tiny_registered, kinds, tmp_path):
    from app.cli import read_spec, submit

    asked = {
        "model": "tiny",
        "dataset": public(kinds),
        "strategy": "dense_head",
        "strategy.width": "32",
        "split.method": "stratified",
        "run.max_steps": "9",
    }
    first = started(session, user, client.post("/jobs", data=asked, follow_redirects=False))
    path = tmp_path / "job.yaml"
    for source in (
        f"/jobs/{ids.public(ids.JOB, first.id)}/job.yaml",
        "/jobs/new/file?" + client.get("/jobs/new", params=asked, headers={"hx-request": "1"}).headers["hx-replace-url"].partition("?")[2],
    ):
        answer = client.get(source)
        assert answer.status_code == 200 and answer.headers["content-disposition"].startswith("attachment"), answer.text
        path.write_text(answer.text)
        assert (
            "  width: 32\n" in answer.text
            and "  seed: 42  # default\n" in answer.text
            and "  learning_rate: 0.001  # default" in answer.text
        )
        again = jobs.get(session, user, ids.parse(ids.JOB, submit(session, user, read_spec(path, None), tmp_path)))
        assert {**again.spec, "name": ""} == {**first.spec, "name": ""}
    loaded = client.post("/jobs/new/file", files={"file": ("job.yaml", path.read_bytes())}, follow_redirects=False)
    assert loaded.status_code == 303, loaded.text
    typed = {name: value for name, value in client.get(loaded.headers["location"]).request.url.params.items()}
    assert started(session, user, client.post("/jobs", data=typed, follow_redirects=False)).spec == {**first.spec, "name": typed["name"]}
    for wrong, said in (
        (b" " * 100_000, "too large"),
        (b"model: [", "The file is not YAML"),
        (b"- 1", "holds no settings"),
        (b"model: tiny\nspeed: 9", "The form has no 'speed'"),
        (b"\xff", "not text in UTF-8"),
    ):
        refused = client.post("/jobs/new/file", files={"file": ("job.yaml", wrong)})
        assert refused.status_code in (400, 422) and said in html.unescape(refused.text), refused.text


def test_a_comparison_shows_the_batch_that_its_jobs_run_with(client, session, user, tiny_registered, kinds):
    page = client.get("/compare/new", params={"model": "tiny", "dataset": public(kinds)}).text
    shown = re.search(r'name="run\.max_tokens_per_step"[^>]*placeholder="(\d+)"', page).group(1)
    rows = re.search(r'for="run-max-tokens-per-step">Tokens per batch <span class="unit">≈ (\d+) rows</span>', page).group(1)
    sent = {"model": "tiny", "dataset": public(kinds), "shown": "strategies", "strategy": ["dense_head", "feature_extraction"]}
    assert client.post("/compare", data=sent, follow_redirects=False).status_code == 303
    assert {str(job.spec["run"]["max_tokens_per_step"]) for job in jobs.list_(session, user)} == {shown} and shown != "2048"
    assert 5 <= int(rows) < 60 and f"≈ {rows} rows per step" in page
    refused = client.post("/compare", data=sent | {"strategy": ["dense_head", "full", "qlora"]})
    assert refused.status_code == 409 and "QLoRA cannot be part of it." in refused.text, "what cannot be had is not left out in silence"


def test_the_api_says_what_auto_came_to(api, session, user, tiny_registered, chats):
    from tests.lives import Life

    made = api.post("/v1/fine_tuning/jobs", json={"model": "tiny", "dataset_id": public(chats), "strategy": {"name": "lora"}}).json()
    assert set(made["hyperparameters"].values()) == {"auto"}
    Life(session, jobs.get(session, user, ids.parse(ids.JOB, made["id"]))).claim()
    begun = api.get(f"/v1/fine_tuning/jobs/{made['id']}").json()
    rows = begun["hyperparameters"]["batch_size"]
    assert begun["hyperparameters"] == {"n_epochs": begun["run"]["epochs"], "batch_size": rows, "learning_rate_multiplier": 1.0}
    assert isinstance(rows, int) and 1 < rows < 60 and begun["run"]["learning_rate"] == 5e-4
    assert begun["method"]["supervised"]["hyperparameters"] == begun["hyperparameters"]


@pytest.mark.long
def test_small_data_holds_out_more_unless_somebody_says_how_much(client, api, session, user, tiny_registered, chats):
    """60 rows hold out ten. The form, the API and the split page say the same share; a tenth that was typed stays a tenth, and so does
    that of a job ordered before the rule."""
    asked = {"model": "tiny", "dataset": public(chats), "strategy": "lora"}
    page = client.get("/jobs/new", params=asked).text
    field = re.search(r'<input id="run-validation-fraction"[^>]*>', page).group(0)
    assert 'placeholder="0.17"' in field and 'value=""' in field
    assert 'name="fraction" type="number" min="0" max="0.9" step="0.01" value="0.17"' in client.get(f"/datasets/{public(chats)}/split").text
    job = started(session, user, client.post("/jobs", data=asked | {"run.validation_fraction": ""}, follow_redirects=False))
    assert job.spec["run"]["validation_fraction"] == 0.17 and "validation_fraction" not in job.order["run"]
    typed = started(session, user, client.post("/jobs", data=asked | {"run.validation_fraction": "0.1"}, follow_redirects=False))
    assert typed.spec["run"]["validation_fraction"] == 0.1
    body = {"model": "tiny", "dataset_id": public(chats), "strategy": {"name": "lora"}}
    assert api.post("/v1/fine_tuning/jobs", json=body).json()["run"]["validation_fraction"] == 0.17
    before = dict(job.spec["run"])
    del before["validation_fraction"]
    assert JobSpec.model_validate(job.spec | {"run": before}).run.validation_fraction == 0.1
