"""What a model that comes in may do: nothing but be a model. The table of hostile folders stands in `hostile_models.py`."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from sqlalchemy import select

from app.errors import BadData, BadField, Conflict, StudioError
from app.kit import manifest
from app.models import import_checks
from app.models import imports as model_imports
from app.models import service as models
from app.tables import Job, Model, Outbox
from tests.factories import make_dataset, make_spec
from tests.security import hostile_models
from tests.security.hostile_models import CONFIG, HONEST, HOSTILE, MARK, TOKENIZER
from worker import tasks
from worker.conversion import convert
from worker.runtime.limited_fork import limited


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_folder_is_refused_in_words(name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(convert, "TRIAL_SECONDS", 1 if name == "a template without end" else 20)
    source = hostile_models.make(name, tiny_model, tmp_path)
    with pytest.raises(StudioError) as caught:
        hostile_models.bring_in(source, tmp_path / "into")
    said = f"{caught.value.message} {caught.value.hint}"
    assert HOSTILE[name].words in said and caught.value.hint
    assert MARK not in said and len(said) < 700
    assert not (tmp_path / "canary").exists()
    if not (source / "vocab.txt").is_symlink() and not (source / TOKENIZER).is_symlink():
        assert not [
            p for p in (tmp_path / "into").rglob("*") if p.is_file() and f"{MARK}-line-1" in p.read_bytes().decode("utf-8", "replace")
        ]


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_folder_comes_in(name: str, tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    HONEST[name](source, tiny_model)
    facts = hostile_models.bring_in(source, tmp_path / "into")
    assert facts["parameters"] > 0 and facts["rules"] == import_checks.RULES


def test_keys_that_say_nothing_are_not_kept(tiny_model: Path, tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    HONEST["WordPiece from vocab.txt"](source, tiny_model)
    hostile_models.bring_in(source, tmp_path / "into")
    kept = json.loads((tmp_path / "into" / CONFIG).read_text())
    assert not kept.keys() & {"name_or_path", "special_tokens_map_file", "tokenizer_file"}
    assert kept["strip_accents"] is None and kept["tokenizer_class"] == "BertTokenizer"


@pytest.mark.parametrize("name", ["map names vocab_file", "init_inputs", "vocab as a path"])
def test_a_vocabulary_from_elsewhere_is_seen_even_if_the_keys_were_allowed(
    name: str, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the lists of keys stands the comparison: what was loaded must be what the folder holds."""
    monkeypatch.setattr("app.models.model_json.check", lambda name, value: value)
    monkeypatch.setattr(import_checks, "check_tokenizer", lambda folder, kind, config: config)
    source = hostile_models.make(name, tiny_model, tmp_path)
    with pytest.raises(BadData, match="tokens that the folder's own files do not name") as caught:
        hostile_models.bring_in(source, tmp_path / "into")
    assert MARK not in caught.value.message


# The fork -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_a_fork_may_take_only_so_much() -> None:
    assert limited(lambda: {"a": [1]}, "It", 5, 2**28) == {"a": [1]}
    with pytest.raises(BadData, match=r"It needed more than 0\.2 GiB"):
        limited(lambda: len(bytes(2**29)), "It", 5, 2**28)
    began = time.monotonic()
    with pytest.raises(BadData, match="longer than 1 seconds") as caught:
        limited(lambda: time.sleep(60), "It", 1, 2**28)
    assert caught.value.code == "out_of_time" and time.monotonic() - began < 10
    with pytest.raises(BadData, match="broke down"):
        limited(lambda: os.abort(), "It", 5, 2**28)
    with pytest.raises(BadData, match="can run code"):
        limited(lambda: import_checks.refuse_pickled("a.pkl") or {}, "It", 5, 2**28)


# In the studio ------------------------------------------------------------------------------------------------------


@pytest.mark.long
def test_the_request_opens_nothing_but_the_config(session, user, data_dir: Path, tiny_model: Path) -> None:
    """Whatever else is in the folder, and however large, the answer comes at once and the child says what is wrong."""
    (data_dir / "import" / "x").mkdir(parents=True)
    hostile_models.make("45 MB of added tokens", tiny_model, data_dir / "import" / "x")
    began = time.process_time()
    model = model_imports.add_folder(session, user, "x/model", "big")
    assert time.process_time() - began < 0.5 and model.status == "fetching"
    session.commit()
    model_imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "error" and "larger than 4 MiB" in model.error["message"] and model.error["hint"]


@pytest.mark.parametrize("name", ["model-" + "0a" * 16, "ftckpt_" + "0" * 32, "ftckpt_x"])
def test_a_name_that_reads_as_an_id_is_refused(session, user, data_dir: Path, tiny_model: Path, name: str) -> None:
    shutil.copytree(tiny_model, data_dir / "import" / "m")
    with pytest.raises(BadField, match="how an id is written"):
        model_imports.add_folder(session, user, "m", name)
    assert model_imports.add_folder(session, user, "m", "model-" + "0a" * 15).status == "fetching"


@pytest.mark.parametrize("path", ["a" * 5000, "loop", "\ud800", "\0"])
def test_a_folder_that_cannot_be_is_refused(session, user, data_dir: Path, path: str) -> None:
    (data_dir / "import").mkdir()
    (data_dir / "import" / "loop").symlink_to("loop")
    with pytest.raises(StudioError) as caught:
        model_imports.add_folder(session, user, path, "m")
    assert caught.value.status in (400, 403)


def kept_before(session, user, data_dir: Path, tiny_model: Path, name: str | None) -> Model:
    """A model as it stands in a studio that took it in before there were such rules."""
    model = Model(
        name=name or "honest", title="x", kind="dialogue", owner_id=user.id, source={"from": "hub", "repo": "a/b"}, status="ready"
    )
    session.add(model)
    session.flush()
    model.path = f"models/{model.id}"
    folder = Path(shutil.copytree(tiny_model, data_dir / model.path))
    model.shape = import_checks.check_head(folder)[0].model_dump()
    if name:
        HOSTILE[name].change(folder, hostile_models.write_secret(data_dir / "secret"))
    model.revision = manifest.write(folder)["revision"]
    session.commit()
    return model


def announced(session) -> list[str]:
    model_imports.reap(session)
    session.commit()
    return list(session.scalars(select(Outbox.key).where(Outbox.task == "luthier.examine")))


@pytest.mark.long
def test_models_of_earlier_rules_are_examined_once(session, user, data_dir: Path, tiny_model: Path) -> None:
    good = kept_before(session, user, data_dir, tiny_model, None)
    bad = kept_before(session, user, data_dir, tiny_model, "map names vocab_file")
    tuned = Model(name="ft:bad", title="x", kind="dialogue", base_id=bad.id, adapter=True, status="ready", source={"from": "job"})
    session.add(tuned)
    spec = make_spec(bad, make_dataset(session, user, data_dir))
    job = Job(
        owner_id=user.id, name="j", status="queued", spec=spec.model_dump(mode="json"), model_id=bad.id, dataset_id=spec.dataset.id, order={}
    )  # fmt: skip
    session.add(job)
    session.commit()
    before = manifest.read(data_dir / str(bad.path))
    assert sorted(announced(session)) == sorted([good.id, bad.id])
    for model in (good, bad):
        tasks.examine(str(model.id))
    session.expire_all()
    assert (good.status, good.source["rules"]) == ("ready", import_checks.RULES)
    assert bad.status == "error" and bad.error["code"] == "refused_by_rules" and "vocab_file" in bad.error["message"]
    assert tuned.status == "error" and bad.name in tuned.error["message"] and job.status == "cancelled"
    assert manifest.verify(data_dir / str(bad.path)) == before  # its files stay
    with pytest.raises(Conflict, match="cannot be used"):
        models.resolve(session, user, bad.name)
    with pytest.raises(Conflict, match="was refused"):
        model_imports.try_again(session, tuned)
    assert len(announced(session)) == 2  # and none is announced again
    fence = good.fence
    model_imports.examine(good.id)  # the message may come twice
    session.refresh(good)
    assert good.fence == fence
    model_imports.try_again(session, bad)
    session.commit()
    model_imports.fetch(bad.id)
    session.refresh(bad)
    assert bad.status == "error"  # the hub is not asked in a test, and what was refused is not taken back from the disk


def test_imports_wait_on_a_queue_of_their_own() -> None:
    from app.queue import EXAMINE, FETCH, READ, ROUTES

    assert ROUTES[FETCH] == ROUTES[EXAMINE] == "import" and "import" not in {
        q for task, q in ROUTES.items() if task not in (FETCH, EXAMINE)
    }
    assert ROUTES[READ] == "data"
