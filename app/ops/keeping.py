"""Commands that keep a studio: backup, restore, upgrade, retention, and the data of one person."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from app.errors import Conflict, NotFound
from app.kit.humanize import human_bytes, plural
from app.ops.console import DataDir, choose, err, out, plainly, say
from app.settings import get_settings

app = typer.Typer()


@app.command()
@plainly
def backup(
    folder: Annotated[Path, typer.Argument(help="Folder of the backups; it may hold earlier ones.", file_okay=False, resolve_path=True)],
    secrets: Annotated[bool, typer.Option(help="Store the signing keys too, in a file of their own.")] = True,
    keep: Annotated[int, typer.Option(min=1, help="Backups to keep in the folder; older ones are removed.")] = 7,
    check: Annotated[bool, typer.Option("--check", help="Restore it into a fresh folder and compare all rows and hashes.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Back up the database and the files, while the studio runs. Exit code 1 when the studio has lost or damaged files."""
    from app.ops import backup as backups
    from app.ops.embedded.up import beside

    choose(data_dir=data_dir)
    with beside(migrates=False):
        done = backups.take(folder, secrets=secrets, keep=keep, say=say)
    say(
        f"Backup {done.name}: {plural(done.rows, 'row')} in {plural(done.tables, 'table')}, {plural(done.files, 'file')}, "
        f"{human_bytes(done.bytes)}; {human_bytes(done.written)} written in {done.seconds:.1f} s."
    )
    if check:
        backups.check(folder, done.name, say)
    for what, names in (("is missing in the studio", done.missing), ("differs from what the studio wrote", done.damaged)):
        for name in names:
            err.print(f"{get_settings().data_dir / name} {what}.")
    if done.missing or done.damaged:
        raise typer.Exit(1)


@app.command()
@plainly
def restore(
    folder: Annotated[Path, typer.Argument(help="Folder of the backups.", exists=True, file_okay=False, resolve_path=True)],
    snapshot: Annotated[str | None, typer.Option(help="Name of a backup in it; otherwise the newest.")] = None,
    data_dir: DataDir = None,
) -> None:
    """Restore a backup into a data folder, and a database, that hold no studio."""
    from app.ops import backup as backups

    choose(data_dir=data_dir)
    told = backups.restore(folder, snapshot, say)
    say(f"The backup of {told['taken_at']} is in {get_settings().data_dir}. Start it with `luthier up`.")


@app.command()
@plainly
def upgrade(
    backup: Annotated[
        Path | None, typer.Option(help="Folder of the backups; otherwise backups in the data folder.", resolve_path=True)
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Only say what would be done.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Bring the database of a stopped studio to this version's schema, after a backup."""
    from app import migrate
    from app.ops import backup as backups
    from app.ops.backup import rows
    from app.ops.embedded.places import Lock
    from app.ops.embedded.up import beside

    choose(data_dir=data_dir)
    settings = get_settings()
    if (holder := Lock(settings.data_dir).holder() if settings.data_dir.exists() else None) is not None:
        raise Conflict(f"The studio is running (process {holder.get('pid')}).", hint="Stop it first; its jobs save and go on afterwards.")
    if not settings.database_url and not (settings.data_dir / "postgres" / "PG_VERSION").exists():
        raise NotFound(f"{settings.data_dir} holds no studio.", hint="Name its folder with --data-dir.")
    with beside(migrates=False):
        with rows.connect() as connection:
            schema = rows.schema_of(connection)
        if schema not in (None, *migrate.steps()):
            raise Conflict(f"The database has the newer schema {schema}.", hint="Install the version that wrote it, or a newer one.")
        steps = {number: title for number, title in migrate.titles().items() if number > (schema or "")}
        folder = backup or settings.data_dir / "backups"
        if not steps:
            say(f"The schema is {schema}, the newest: there is nothing to do.")
            return
        say(f"The schema is {schema or 'not there'}. A backup goes to {folder}; then these steps run, all in one transaction:")
        for number, title in steps.items():
            say(f"  {number}  {title}")
        if plan:
            return
        if schema is not None:
            done = backups.take(folder, say=say)
            say(f"Backup {done.name}: {plural(done.rows, 'row')}, {plural(done.files, 'file')}, {human_bytes(done.bytes)}.")
            if done.missing or done.damaged:
                say(f"The studio has lost or damaged {plural(len(done.missing) + len(done.damaged), 'file')}; `luthier backup` names them.")
        migrate.upgrade(str(get_settings().database_url))
        say(f"The schema is {migrate.newest()}. Start the studio with `luthier up`.")


@app.command()
@plainly
def retention(
    preview: Annotated[bool, typer.Option("--preview", help="Only show what the rules would remove now.")] = False, data_dir: DataDir = None
) -> None:
    """Remove now what is older than the settings allow, as the running studio does once an hour."""
    from app import retention as rules
    from app.db import transaction
    from app.ops.embedded.up import beside

    choose(data_dir=data_dir)
    table = Table("what", "setting", "days", "due now", "size", box=None, pad_edge=False)
    with beside(), transaction() as session:
        if not preview:
            removed = rules.apply(session)
            say("\n".join(f"{name}: {count} removed" for name, count in removed.items()) or "Nothing is due.")
            return
        for found in rules.preview(session):
            days = "kept forever" if found.rule.days is None else f"{found.rule.days:g}"
            due = ("", "") if found.rule.days is None else (str(found.count), human_bytes(found.bytes) if found.bytes else "")
            table.add_row(found.rule.title, f"LUTHIER_{found.rule.setting.upper()}", days, *due)
    out.print(table)


@app.command("export-person")
@plainly
def export_person(
    name: Annotated[str, typer.Argument(help="The name of the account.")],
    file: Annotated[Path, typer.Argument(help="The zip to write.", dir_okay=False, resolve_path=True)],
    data_dir: DataDir = None,
) -> None:
    """Write everything that one person has in the studio to a zip."""
    from app import personal_data
    from app.db import transaction
    from app.ops.embedded.up import beside

    choose(data_dir=data_dir)
    with beside(), transaction() as session:
        counts = personal_data.export(session, personal_data.find(session, name), file)
    say(f"{plural(sum(counts.values()), 'row')} of {name} and their files are in {file}, {human_bytes(file.stat().st_size)}.")


@app.command("delete-person")
@plainly
def delete_person(
    name: Annotated[str, typer.Argument(help="The name of the account.")],
    yes: Annotated[bool, typer.Option("--yes", help="Delete, and not only say what would be deleted.")] = False,
    data_dir: DataDir = None,
) -> None:
    """Delete an account with everything that belongs to it. Without --yes it only says what that is."""
    from sqlalchemy import func, select

    from app import personal_data
    from app.db import transaction
    from app.ops.embedded.up import beside
    from app.tables import AuditLog

    choose(data_dir=data_dir)
    with beside(), transaction() as session:
        user = personal_data.find(session, name)
        if yes:
            session.add(AuditLog(type="user.deleted", actor="console", object_id=user.id.hex, details={"command": "delete-person"}))
            counts = personal_data.remove(session, user)
        else:
            mine = personal_data.belonging(user)
            counts = {table.name: session.scalar(select(func.count()).select_from(table).where(held)) or 0 for table, held in mine.items()}
    for table, count in counts.items():
        if count:
            say(f"  {table}: {count}")
    say(
        f"{name} is deleted."
        if yes
        else f"This is what would be deleted; `luthier delete-person {name} --yes` does it. It cannot be undone."
    )
