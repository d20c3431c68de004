"""`luthier …`: the commands, each a few lines over a service. Those that keep a studio are in `app/ops/keeping.py`."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Column, Table

from app.errors import BadData, BadField, Unavailable
from app.ops import keeping, users
from app.ops.console import ConsoleRun, DataDir, as_owner, choose, err, here_address, out, owner_session, plainly, say
from app.settings import get_settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.tables import User

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="A studio for fine-tuning language models.")
keys = typer.Typer(no_args_is_help=True, help="API keys.")
models = typer.Typer(no_args_is_help=True, help="Models.")
app.add_typer(keys, name="keys")
app.add_typer(users.users, name="users")
app.add_typer(models, name="models")
app.add_typer(keeping.app)


@app.command()
@plainly
def up(
    host: Annotated[str | None, typer.Option(help="Address to listen on.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to listen on; 0 takes a free one.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Start the studio and keep it running until Ctrl-C."""
    from app.ops.embedded.up import up as start

    choose(host=host, port=port, data_dir=data_dir)
    start(say)


@app.command()
@plainly
def link(
    name: Annotated[str | None, typer.Argument(help="Who signs in with it; the first account, where nobody is named.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Print a new sign-in link of the running studio. It needs no password and no two-step code."""
    choose(data_dir=data_dir)

    def make(session: Session, user: User) -> str:
        from app.web import auth, people

        return auth.new_sign_in_link(session, people.named(session, name) if name else user)

    print(f"{here_address()}{as_owner(make)}")


@keys.command("create")
@plainly
def create_key(
    name: Annotated[str, typer.Argument(help="What the key is for.")],
    scope: Annotated[list[str] | None, typer.Option(help="read, generate, write or admin; several may be given.")] = None,
    days: Annotated[float | None, typer.Option(help="How long it lasts; without it for good.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Make an API key and print it, alone. It is shown only this once."""
    choose(data_dir=data_dir)

    def make(session: Session, user: User) -> str:
        from app.web.auth import create_key as create

        return create(session, user, name, scope or (), days)[1]

    print(as_owner(make))


@models.command("add")
@plainly
def add_model(
    name: Annotated[str, typer.Argument(help="A starter model, or the name for the model in --path.")],
    path: Annotated[
        Path | None, typer.Option(help="Folder saved by save_pretrained().", exists=True, file_okay=False, resolve_path=True)
    ] = None,
    accept_terms: Annotated[bool, typer.Option("--accept-terms", help="Accept the model's license terms.")] = False,
    files_only: Annotated[bool, typer.Option("--files-only", help="Bring a starter's files; the next `luthier up` takes them in.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Bring a model into the studio."""
    choose(data_dir=data_dir)
    if files_only:
        from app.models import starters

        starters.ensure(name, accept_terms=accept_terms)
        say(f"{name} is here.")
        return

    def order(session: Session, user: User) -> Any:
        from app.models import imports as model_imports

        if path is not None:
            return model_imports.add_folder(session, user, str(path), name, anywhere=True).id
        return model_imports.add_starter(session, name, accept_terms=accept_terms).id

    with owner_session() as run:
        bring(run, run(order))
    say(f"{name} is here.")


@app.command()
@plainly
def train(
    spec: Annotated[Path, typer.Argument(help="YAML file with model, training_file, strategy, run.", exists=True, dir_okay=False)],
    variant: Annotated[str | None, typer.Option(help="Take the settings under variants: NAME in the file.")] = None,
    here: Annotated[bool, typer.Option("--here", help="Train at once in this terminal, without a studio or a queue.")] = False,
    profile: Annotated[bool, typer.Option("--profile", help="As --here, and record where the time of a step goes.")] = False,
    follow: Annotated[bool, typer.Option(help="Follow the job to its end.")] = True,
    data_dir: DataDir = None,
) -> None:
    """Submit a job from a YAML file to the running studio and follow it, or train it here."""
    from app.ops.embedded.places import Lock

    choose(data_dir=data_dir)
    settings = get_settings()
    if here or profile:
        train_here(read_spec(spec, variant), spec.parent, profile)
        return
    if not settings.database_url and Lock(settings.data_dir).holder() is None:
        raise Unavailable("No studio is running, so nobody would train this.", hint="Start one with `luthier up` in another terminal.")
    order = read_spec(spec, variant)
    with owner_session() as run:
        job_id = run(lambda session, user: submit(session, user, order, spec.parent))
        say(f"Job {job_id} is queued.")
        if follow and run_to_end(run, job_id) != "succeeded":
            raise typer.Exit(1)


@app.command("import")
@plainly
def import_config(
    config: Annotated[
        Path,
        typer.Argument(
            help="A configuration of LLaMA-Factory, Axolotl, Unsloth, Soup or a job of OpenAI's API.", exists=True, dir_okay=False
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="Where the job is written.")] = Path("job.yaml"),
) -> None:
    """Read a training configuration of another program as a job for `luthier train`, and say what has no counterpart."""
    from app import config_formats

    try:
        found, translation = config_formats.read(config.read_text(encoding="utf-8"))
    except UnicodeDecodeError:
        raise BadData(f"{config} is not text in UTF-8.", hint="Name a YAML or JSON file.") from None
    if output.exists():
        raise BadField(f"{output} exists.", hint="Name another file with --output.", param="output")
    output.write_text(config_formats.as_file(found, translation), encoding="utf-8")
    say(f"{config.name} is a configuration of {found.title}. The job is in {output}.")
    for note in translation.notes:
        say(f"  {note.key}: {note.message}.")
    say(f"Add the model {translation.order['model']} (Models, or luthier models add), then: luthier train {output}")


@app.command("jobs")
@plainly
def list_jobs(data_dir: DataDir = None) -> None:
    """List the jobs, newest first."""
    choose(data_dir=data_dir)
    table = Table(Column("job", no_wrap=True, min_width=38), "name", "status", "step", "made", box=None)  # an id is never truncated

    def read(session: Session, user: User) -> None:
        from app.jobs import service
        from app.kit import ids

        for job in service.list_(session, user):
            step = f"{job.step}/{job.total_steps}" if job.total_steps else str(job.step)
            table.add_row(ids.public(ids.JOB, job.id), job.name, job.status, step, f"{job.created_at:%Y-%m-%d %H:%M}")

    as_owner(read)
    out.print(table if table.row_count else "No jobs yet.")


@app.command()
@plainly
def status(data_dir: DataDir = None) -> None:
    """Say whether a studio is running on the data folder, and where. Exit code 3 when none is."""
    from app.ops.embedded.places import Lock

    choose(data_dir=data_dir)
    folder = get_settings().data_dir
    holder = Lock(folder).holder()
    if holder is None:
        say(f"No studio is running on {folder}.")
        raise typer.Exit(3)
    say(f"A studio is running on {folder}: process {holder.get('pid')}, {holder.get('url', 'starting')}.")


@app.command()
@plainly
def doctor(data_dir: DataDir = None) -> None:
    """Look at this machine and say what is missing. Exit code 1 when something must be fixed."""
    from app.ops.doctor import examine

    choose(data_dir=data_dir)
    signs = {"good": "[green]good[/]", "note": "[yellow]note[/]", "bad": "[bold red]bad[/]"}
    table, bad = Table("", "what", "found", "what to do", box=None, pad_edge=False), 0
    for finding in examine():
        table.add_row(signs[finding.verdict], finding.what, escape(finding.found), escape(finding.hint))
        bad += finding.verdict == "bad"
    out.print(table)
    if bad:
        raise typer.Exit(1)


@app.command()
@plainly
def openapi(markdown: Annotated[bool, typer.Option(help="As a page to read, which is docs/api.md.")] = False) -> None:
    """Print what the API takes and answers, as an OpenAPI document in JSON. No studio need run."""
    from app.main import create_app
    from app.schemas import api_reference
    from app.schemas.openapi import document

    found = document(create_app())
    typer.echo(api_reference.markdown(found) if markdown else json.dumps(found, indent=1), nl=not markdown)


# Under the commands -----------------------------------------------------------------------------------------------------


def bring(run: ConsoleRun, model_id: Any) -> None:
    """Fetch a requested model here and now, or wait for the studio's own worker if that was quicker to claim it."""
    from rich.progress import Progress

    from app.models.imports import fetch
    from app.tables import Model

    def look(session: Session, user: User) -> tuple[str, float | None, dict[str, Any] | None]:
        model = session.get_one(Model, model_id)
        return model.status, model.progress, model.error

    worker = threading.Thread(target=fetch, args=(model_id,), daemon=True)
    worker.start()
    with Progress(console=err, transient=True) as bar:
        line = bar.add_task("Fetching the model", total=1.0)
        while (found := run(look))[0] == "fetching":
            bar.update(line, completed=found[1] or 0.0)
            time.sleep(0.3)
    if found[0] != "ready":
        error = found[2] or {}
        raise Unavailable(error.get("message", "The model could not be fetched."), hint=error.get("hint", ""))


def train_here(order: dict[str, Any], folder: Path, profile: bool) -> None:
    """Train a request in a process of our own and print its events."""
    from app import events
    from app.jobs import local as local_run

    spec = local_run.spec_of(order, folder)
    say(f"{spec.strategy.title} on {spec.model.name}, {spec.dataset.rows} rows.")
    total: int | None = None
    for event in local_run.train(spec, profile=profile):
        total = event.total_steps if isinstance(event, events.Started) else total
        if isinstance(event, events.Finished):
            say(f"The result is in {get_settings().data_dir / event.path}.")
        elif line := event_line(event.type, event.model_dump(), total):
            say(line)


def read_spec(path: Path, variant: str | None) -> dict[str, Any]:
    """The request in a YAML file; the settings under `variants: NAME` override it, key by key."""
    import yaml

    try:
        order = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise BadData(f"{path} is not YAML: {error}", hint="Fix the line it names.") from None
    if not isinstance(order, dict):
        raise BadData(f"{path} holds no settings.", hint="It needs at least `model:` and `training_file:`.")
    variants = order.pop("variants", None) or {}
    if variant is None:
        return order
    if variant not in variants:
        raise BadField(f"{path} has no variant {variant!r}.", hint=f"It has: {', '.join(variants) or 'none'}.", param="variant")
    return laid_over(order, variants[variant])


def laid_over(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    both = {name for name in over if isinstance(under.get(name), dict) and isinstance(over[name], dict)}
    return under | {name: laid_over(under[name], value) if name in both else value for name, value in over.items()}


def submit(session: Session, user: User, order: dict[str, Any], folder: Path) -> str:
    """Create the job; a `training_file` that is a path on this machine is uploaded first. Returns its public id."""
    from app.datasets import service as datasets
    from app.jobs import service as jobs
    from app.jobs.request import read_order
    from app.kit import ids
    from app.storage import files

    for field in ("training_file", "validation_file"):
        name = order.get(field)
        if isinstance(name, str) and not name.startswith("file-"):
            path = folder / name
            if not path.is_file():
                raise BadField(
                    f"{field} names {path}, which is not a file.",
                    hint="Write a path relative to the YAML file, or a file id.",
                    param=field,
                )
            file = files.add_bytes(session, user, path.read_bytes(), path.name, "fine-tune")
            datasets.create(session, user, file)
            order[field] = ids.public(ids.FILE, file.id)
    return ids.public(ids.JOB, jobs.create(session, user, read_order(order)).id)


def run_to_end(run: ConsoleRun, job_id: str) -> str:
    """Print a job's events until it ends; returns its last status."""
    from app.jobs import service as jobs
    from app.kit import ids

    key, seen, ended = ids.parse(ids.JOB, job_id), 0, ("succeeded", "failed", "cancelled", "paused")

    def look(session: Session, user: User) -> tuple[str, int]:
        job = jobs.get(session, user, key)
        rows = jobs.events(session, job, after_id=seen)
        for row in rows:
            if line := event_line(row.type, row.data, job.total_steps):
                say(line)
        if job.error and job.status in ended:
            err.print(escape(f"{job.error.get('message', '')} {job.error.get('hint', '')}".strip()))
        return job.status, rows[-1].id if rows else seen

    while True:
        status_, seen = run(look)
        if status_ in ended:
            return status_
        time.sleep(1.0)


def event_line(type_: str, data: dict[str, Any], total_steps: int | None) -> str | None:
    """One line for one event; None for those that are not worth a line at a console."""
    if type_ == "step":
        total = total_steps or data.get("total_steps") or "?"
        speed = f", {data['tokens_per_second']:.0f} tokens/s" if data.get("tokens_per_second") else ""
        return f"step {data['step']}/{total}: loss {data['loss']:.4f}{speed}"
    if type_ == "evaluated":
        return f"step {data['step']}: validation loss {data['loss']:.4f}"
    if type_ == "progress":
        return f"{data['what']}: {data['share']:.0%}"
    if type_ == "log":
        return str(data.get("message"))
    return {"saved": f"step {data.get('step')}: saved", "finished": "finished", "claimed": "started"}.get(type_, type_)


if __name__ == "__main__":
    app(prog_name="luthier")
    sys.exit(0)
