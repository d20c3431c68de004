"""Models: what a name means, who depends on whom, and how they come in."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from sqlalchemy import select, text, update

from app import db
from app.errors import BadData, BadField, Conflict, Forbidden, NotFound, Unavailable, Unsupported
from app.events import Finished, Measured
from app.kit import ids, manifest
from app.leases import MAX_DEATHS, OVER
from app.models import imports as model_imports
from app.models import merging
from app.models import service as models
from app.tables import Checkpoint, Job, Model, Outbox, User
from tests.factories import make_dataset, make_spec
from tests.warm import warm_children  # noqa: F401  # a fixture

MEASURED = Measured(peak_memory_bytes=1, seconds=1, tokens_per_second=1, tokens=1, trained_tokens=1, steps=1, device="cpu")


def finished(path: str = "runs/x/a1/final", adapter: str | None = "cd" * 32, kind: str = "dialogue") -> Finished:
    return Finished(
        reason="completed", step=10, path=path, bytes=100, revision="ab" * 32, adapter_sha256=adapter, kind=kind, measured=MEASURED
    )


@pytest.fixture
def job_on(session, user, data_dir):
    """A job that tunes a given model."""
    dataset = make_dataset(session, user, data_dir)

    def make(base: Model, suffix: str | None = None, status: str = "running", strategy: dict | None = None) -> Job:
        spec = make_spec(base, dataset, strategy)
        job = Job(
            owner_id=user.id, name="a job", status=status, spec=spec.model_dump(mode="json"), model_id=base.id, dataset_id=dataset.id,
            order={"suffix": suffix},
        )  # fmt: skip
        session.add(job)
        session.flush()
        return job

    return make


@pytest.fixture
def stranger(session) -> User:
    other = User(name="stranger")
    session.add(other)
    session.commit()
    return other


# Names --------------------------------------------------------------------------------------------------------------


def test_a_base_is_found_by_name_and_by_public_id(session, user, tiny_registered) -> None:
    assert models.get(session, user, "tiny") is tiny_registered
    assert models.get(session, user, ids.public(ids.MODEL, tiny_registered.id)) is tiny_registered
    ref = models.resolve(session, user, "tiny").ref
    assert (ref.path, ref.revision, ref.adapters, ref.kind) == (tiny_registered.path, tiny_registered.revision, (), "dialogue")


@pytest.mark.parametrize("name", ["", "nothing", "model-" + "0" * 32, "ft:tiny:luthier::" + "0" * 12, "../tiny", "tiny\0", "ftckpt_zz", "ft:x:" + "0" * 12 + ":ckpt-step-5"])  # fmt: skip
def test_a_name_that_means_nothing_is_not_found(session, user, tiny_registered, name: str) -> None:
    if name == "tiny\0":
        assert models.get(session, user, name) is tiny_registered
        return
    with pytest.raises(NotFound) as caught:
        models.resolve(session, user, name)
    assert caught.value.param == "model"


def test_a_tuned_model_is_named_after_base_suffix_and_job(session, user, tiny_registered, job_on) -> None:
    job = job_on(tiny_registered, "my letters / 2")
    model = models.register_tuned(session, job, finished())
    assert model.name == f"ft:tiny:luthier:my-letters-2:{job.id.hex[:12]}"
    assert (model.title, model.base_id, model.strategy, model.adapter, model.license) == (
        "a job",
        tiny_registered.id,
        "lora",
        True,
        "apache-2.0",
    )
    assert models.register_tuned(session, job, finished()) is model
    assert models.resolve(session, user, model.name).ref.adapters[0].sha256 == "cd" * 32


def test_a_chain_of_adapters_is_laid_on_in_order_and_named_after_the_first_base(session, user, tiny_registered, job_on) -> None:
    one = models.register_tuned(session, job_on(tiny_registered), finished("runs/1/a1/final", "11" * 32))
    job = job_on(one, "again")
    two = models.register_tuned(session, job, finished("runs/2/a1/final", "22" * 32))
    assert two.name == f"ft:tiny:luthier:again:{job.id.hex[:12]}"
    ref = models.reference(session, two)
    assert ref.path == tiny_registered.path and [a.sha256[:2] for a in ref.adapters] == ["11", "22"]
    assert [m.name for m in models.lineage(session, two)] == ["tiny", one.name, two.name]
    assert [m.name for m in models.list_(session, user)] == ["tiny", one.name, two.name]


def test_a_whole_tuned_model_stands_on_its_own_weights(session, user, tiny_registered, job_on) -> None:
    model = models.register_tuned(session, job_on(tiny_registered, strategy={"name": "full"}), finished("runs/1/a1/final", None))
    ref = models.reference(session, model)
    assert (model.adapter, ref.path, ref.revision, ref.adapters) == (False, "runs/1/a1/final", "ab" * 32, ())


def checkpoint_of(session, job: Job, data_dir: Path, step: int) -> Checkpoint:
    folder = data_dir / "runs" / str(job.id) / "a1" / f"checkpoint-{step}"
    (folder / "weights").mkdir(parents=True)
    (folder / "weights" / "adapter_model.safetensors").write_bytes(b"w" * 50)
    manifest.write(folder)
    row = Checkpoint(
        job_id=job.id, step=step, path=folder.relative_to(data_dir).as_posix(), manifest_sha256=manifest.sha256_of(folder / manifest.NAME),
        bytes=50, metrics={},
    )  # fmt: skip
    session.add(row)
    session.flush()
    return row


@pytest.mark.parametrize("strategy", ["lora", "full"])
def test_a_checkpoint_of_a_running_job_is_a_model(session, user, tiny_registered, job_on, data_dir, strategy: str) -> None:
    job = job_on(tiny_registered, "x", strategy={"name": strategy})
    row = checkpoint_of(session, job, data_dir, 20)
    name = models.checkpoint_name(session, job, 20)
    assert name == f"ft:tiny:luthier:x:{job.id.hex[:12]}:ckpt-step-20"
    for spelled in (name, ids.public(ids.CHECKPOINT, row.id)):
        found = models.resolve(session, user, spelled)
        assert (found.checkpoint, found.ref.name) == (row, name)
        last = found.ref.adapters[-1].path if strategy == "lora" else found.ref.path
        assert last == f"{row.path}/weights"


def test_a_checkpoint_that_is_torn_swept_or_someone_elses_is_refused(session, user, stranger, tiny_registered, job_on, data_dir) -> None:
    job = job_on(tiny_registered)
    row = checkpoint_of(session, job, data_dir, 20)
    name = models.checkpoint_name(session, job, 20)
    with pytest.raises(NotFound):
        models.resolve(session, stranger, name)
    with pytest.raises(NotFound):
        models.resolve(session, user, name.replace("ft:tiny", "ft:other"))
    (data_dir / row.path / "weights" / "adapter_model.safetensors").write_bytes(b"w" * 49)
    with pytest.raises(BadData, match="no longer whole"):
        models.resolve(session, user, name)
    row.deleted_at = text("clock_timestamp()")
    session.flush()
    with pytest.raises(NotFound):
        models.resolve(session, user, name)


def test_another_persons_model_is_not_found_and_a_shared_one_is(session, user, stranger, tiny_registered, job_on) -> None:
    mine = models.register_tuned(session, job_on(tiny_registered), finished())
    assert models.get(session, stranger, "tiny") is tiny_registered
    with pytest.raises(NotFound):
        models.get(session, stranger, mine.name)
    assert [m.name for m in models.list_(session, stranger)] == ["tiny"]


# Deleting -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["queued", "running", "paused"])
def test_a_model_that_a_job_tunes_cannot_be_deleted(session, user, tiny_registered, job_on, status: str) -> None:
    job_on(tiny_registered, status=status)
    with pytest.raises(Conflict, match="still needed") as caught:
        models.delete(session, user, tiny_registered)
    assert caught.value.code == "model_in_use"


def test_an_adapter_holds_its_base_and_a_whole_model_does_not(session, user, tiny_registered, job_on, data_dir) -> None:
    whole = models.register_tuned(session, job_on(tiny_registered, status="succeeded", strategy={"name": "full"}), finished("runs/w", None))
    adapter = models.register_tuned(session, job_on(tiny_registered, status="succeeded"), finished("runs/a"))
    session.commit()
    with pytest.raises(Conflict, match=adapter.name):
        models.delete(session, user, tiny_registered)
    session.rollback()  # it held the row's lock
    folder = data_dir / str(tiny_registered.path)
    with db.transaction() as own:
        models.delete(own, user, own.get_one(Model, adapter.id))
        models.delete(own, user, own.get_one(Model, tiny_registered.id))
        assert folder.is_dir()  # files go after the commit, so that a rollback keeps them
    assert not folder.exists()
    session.expire_all()
    with pytest.raises(NotFound):
        models.get(session, user, "tiny")
    assert models.lineage(session, whole)[0].name == "tiny"


def test_a_deleted_models_name_can_be_taken_again(session, user, tiny_registered) -> None:
    models.delete(session, user, tiny_registered)
    session.add(Model(name="tiny", title="Other", kind="generic"))
    session.flush()
    assert models.get(session, user, "tiny").title == "Other"


def test_a_path_that_climbs_out_is_never_removed(session, user, tiny_registered, tmp_path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    tiny_registered.path = "models/../../outside"
    session.flush()
    with pytest.raises(BadField):
        models.delete(session, user, tiny_registered)
    assert outside.is_dir()


# Bringing in --------------------------------------------------------------------------------------------------------


@pytest.fixture
def importable(data_dir: Path, tiny_model: Path) -> Path:
    return Path(shutil.copytree(tiny_model, data_dir / "import" / "workshop"))


@pytest.mark.long
def test_a_local_folder_is_copied_checked_and_ready(session, user, importable, data_dir) -> None:
    (importable / "notes.txt").write_text("stays behind")
    (importable / "README.md").write_text("---\nlicense: mit\n---\n# Workshop\n")
    model = model_imports.add_folder(session, user, "workshop")
    assert (model.status, model.name, model.owner_id) == ("fetching", "workshop", user.id)
    session.commit()
    assert session.scalar(select(Outbox.task).where(Outbox.key == model.id)) == "luthier.fetch"
    model_imports.fetch(model.id)
    session.refresh(model)
    assert (model.status, model.error, model.kind, model.license, model.progress) == ("ready", None, "dialogue", "mit", None)
    folder = data_dir / str(model.path)
    assert model.path == f"models/{model.id}" and manifest.verify(folder)["revision"] == model.revision
    assert not (folder / "notes.txt").exists() and (folder / "tokenizer.json").is_file()
    assert models.reference(session, model).shape.parameters() == manifest.read(folder)["parameters"]
    before = (folder / manifest.NAME).stat().st_mtime_ns
    model_imports.fetch(model.id)  # the message may come twice
    assert (folder / manifest.NAME).stat().st_mtime_ns == before
    assert not list((data_dir / "tmp").iterdir())


def test_a_folder_outside_the_import_folders_is_forbidden_to_requests(session, user, tiny_model, data_dir) -> None:
    (data_dir / "import").mkdir()
    (data_dir / "import" / "link").symlink_to(tiny_model)
    for path in (str(tiny_model), "../secrets", "link", ".", "/etc", "x/../../models"):
        with pytest.raises(Forbidden) as caught:
            model_imports.add_folder(session, user, path, "name")
        assert "luthier models add" in caught.value.hint
    for path in ("", " ", "a\0b"):
        with pytest.raises(BadField):
            model_imports.add_folder(session, user, path, "name")
    assert model_imports.add_folder(session, user, str(tiny_model), "by-hand", anywhere=True).status == "fetching"


@pytest.mark.parametrize("name", ["ft:x", "a b", "../x", "a/b/c", "-x", "x" * 200, "a:b", "ä"])
def test_names_that_cannot_be_are_refused(session, user, importable, name: str) -> None:
    with pytest.raises(BadField, match="cannot be a model's name"):
        model_imports.add_folder(session, user, "workshop", name)
    with pytest.raises(BadField, match="where the loaded models are listed"):
        model_imports.add_folder(session, user, "workshop", "loaded")


def test_a_name_in_use_is_a_conflict(session, user, importable, tiny_registered) -> None:
    with pytest.raises(Conflict, match="already"):
        model_imports.add_folder(session, user, "workshop", "tiny")


def test_hostile_folders_are_refused_before_a_row_exists(session, user, importable) -> None:
    (importable / "optimizer.pt").write_bytes(b"x")
    with pytest.raises(Unsupported):
        model_imports.add_folder(session, user, "workshop")
    assert session.scalar(select(Model.id)) is None


@pytest.mark.usefixtures("warm_children")
@pytest.mark.parametrize(
    ("template", "passes"),
    [
        ("{% for m in messages %}{{ m.content }}\n{% endfor %}", True),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", False),
        ("{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}", False),
        ("{{ raise_exception('no') }}", False),
        ("nothing", False),
    ],
)
def test_a_chat_template_is_tried_in_the_child(session, user, importable, data_dir, template: str, passes: bool) -> None:
    (importable / "chat_template.jinja").write_text(template)
    model = model_imports.add_folder(session, user, "workshop")
    session.commit()
    model_imports.fetch(model.id)
    session.refresh(model)
    assert model.status == ("ready" if passes else "error")
    if not passes:
        assert "template" in model.error["message"] and model.error["hint"]
    assert not list(data_dir.rglob("canary"))


@pytest.mark.usefixtures("warm_children")
def test_weights_that_lack_a_tensor_are_refused_by_the_child(session, user, importable) -> None:
    from safetensors.torch import load_file, save_file

    path = importable / "model.safetensors"
    tensors = load_file(path)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    model = model_imports.add_folder(session, user, "workshop")
    session.commit()
    model_imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "error" and "down_proj" in model.error["message"]
    with pytest.raises(Conflict, match="cannot be used"):
        models.resolve(session, user, "workshop")


def test_the_hub_is_not_asked_when_offline_and_says_so_when_away(session, user, monkeypatch) -> None:
    with pytest.raises(Unavailable, match="offline"):
        model_imports.add_hub(session, user, "Qwen/Qwen2.5-0.5B")
    for repo in ("../x", "http://evil/x", "a/b/c", "", "a b"):
        with pytest.raises(BadField):
            model_imports.add_hub(session, user, repo)
    from app.settings import get_settings

    monkeypatch.setattr(get_settings(), "offline", False)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    model = model_imports.add_hub(session, user, "Qwen/Qwen2.5-0.5B")
    session.commit()
    model_imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "error" and model.error["message"].startswith("The hub cannot be reached")
    assert models.get(session, user, "Qwen/Qwen2.5-0.5B") is model


def test_the_hubs_files_are_chosen_by_the_allow_list() -> None:
    from app.errors import TooLarge
    from app.models import hub

    sizes = {
        "model.safetensors": 10,
        "pytorch_model.bin": 10,
        "modeling_evil.py": 1,
        "config.json": 1,
        "onnx/model.onnx": 9,
        "../x.json": 1,
    }
    assert hub.choose(sizes, "a/b") == {"model.safetensors": 10, "config.json": 1}
    with pytest.raises(Unsupported):
        hub.choose({"pytorch_model.bin": 1, "config.json": 1}, "a/b")
    with pytest.raises(TooLarge):
        hub.choose({"model.safetensors": 10**12}, "a/b")


# Claim and reaper ---------------------------------------------------------------------------------------------------


def test_a_fetch_is_claimed_once_and_announced_again_when_its_worker_dies(session, user, importable) -> None:
    model = model_imports.add_folder(session, user, "workshop")
    session.commit()
    assert model_imports._claim(model_imports.FETCHES, model.id) == 1
    assert model_imports._claim(model_imports.FETCHES, model.id) is None
    session.execute(update(Model).values(lease_until=OVER))
    session.commit()
    model_imports.reap(session)
    session.commit()
    assert len(session.scalars(select(Outbox).where(Outbox.key == model.id)).all()) == 2
    late = model_imports._Beat(model_imports.FETCHES, model.id, 1)
    assert model_imports._claim(model_imports.FETCHES, model.id) == 2
    with pytest.raises(model_imports.FetchLost):
        late(0.5)
    model_imports._end(model.id, 1, status="ready")
    session.refresh(model)
    assert model.status == "fetching"


@pytest.mark.usefixtures("warm_children")
def test_a_fetch_that_keeps_dying_is_given_up_and_can_be_tried_again(session, user, importable) -> None:
    model = model_imports.add_folder(session, user, "workshop")
    session.commit()
    for _ in range(MAX_DEATHS):
        fence = model_imports._claim(model_imports.FETCHES, model.id)
        session.execute(update(Model).where(Model.id == model.id).values(lease_until=OVER))
        session.commit()
        model_imports.reap(session)
        session.commit()
    assert model.status == "error" and model.error["code"] == "worker_lost" and model.error["hint"]
    model_imports.try_again(session, model)
    session.commit()
    with pytest.raises(model_imports.FetchLost):
        model_imports._Beat(model_imports.FETCHES, model.id, fence)(0.5)
    assert model_imports._claim(model_imports.FETCHES, model.id) == fence + 1, "a fence never goes back, so no old worker holds it again"
    session.execute(update(Model).where(Model.id == model.id).values(lease_until=OVER))
    session.commit()
    model_imports.fetch(model.id)
    session.refresh(model)
    assert model.status == "ready"


# Merging ------------------------------------------------------------------------------------------------------------


def tune_by_hand(folder: Path, base: Path) -> Path:
    """An adapter with weights that change the answers, as the trainer writes it."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from app.strategies.lora import Lora

    torch.manual_seed(1)
    strategy = Lora(rank=4)
    model = strategy.attach(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    folder.mkdir(parents=True)
    strategy.save(model, folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    (folder / "strategy.json").write_text(json.dumps(strategy.model_dump()))
    manifest.write(folder)
    return folder


@pytest.mark.long
def test_an_adapter_is_merged_into_plain_weights_with_the_same_answers(
    session, user, tiny_registered, tiny_model, job_on, data_dir
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from worker.modeling.loading import load_model

    folder = tune_by_hand(data_dir / "runs" / "1" / "final", tiny_model)
    tuned = models.register_tuned(session, job_on(tiny_registered, status="succeeded"), finished("runs/1/final", "cd" * 32))
    merged = merging.merge(session, user, tuned)
    assert merging.merge(session, user, tuned) is merged
    session.commit()
    model_imports.fetch(merged.id)
    session.refresh(merged)
    assert (merged.status, merged.error, merged.adapter, merged.kind) == ("ready", None, False, "dialogue")
    assert merged.name == f"{tuned.name}:merged" and models.reference(session, merged).adapters == ()
    trial = torch.tensor([[5, 6, 7, 8, 9, 10]])
    with torch.no_grad():
        ours = AutoModelForCausalLM.from_pretrained(data_dir / str(merged.path), dtype=torch.float32)(trial).logits
        with_adapter = load_model(models.reference(session, tuned))(trial).logits
        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)(trial).logits
    assert torch.allclose(ours, with_adapter, atol=2e-3) and not torch.allclose(ours, base, atol=1e-2)
    assert folder.is_dir()


def test_what_cannot_be_merged_says_why(session, user, tiny_registered) -> None:
    with pytest.raises(Conflict, match="cannot be merged"):
        merging.merge(session, user, tiny_registered)
