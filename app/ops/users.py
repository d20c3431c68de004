"""`luthier users …`: the people of the studio."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from app.ops.console import DataDir, as_owner, choose, here_address, out, plainly, say

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.tables import User

users = typer.Typer(no_args_is_help=True, help="People with an account.")


@users.command("list")
@plainly
def list_users(data_dir: DataDir = None) -> None:
    """List everybody with an account."""
    choose(data_dir=data_dir)
    table = Table("name", "role", "status", "since", box=None)

    def read(session: Session, user: User) -> None:
        from app.web import people

        for one in people.list_(session):
            table.add_row(escape(one.name), one.role, "disabled" if one.disabled_at else "active", f"{one.created_at:%Y-%m-%d}")

    as_owner(read)
    out.print(table)


@users.command("invite")
@plainly
def invite_user(
    role: Annotated[str, typer.Option(help="admin, member or viewer.")] = "member",
    note: Annotated[str, typer.Option(help="Whom it is for.")] = "",
    days: Annotated[float, typer.Option(help="How long the link holds.")] = 7,
    data_dir: DataDir = None,
) -> None:
    """Print a link with which one person makes an account."""
    choose(data_dir=data_dir)

    def make(session: Session, user: User) -> str:
        from app.web import people

        return people.invite(session, user, role, note, days)[1]

    print(f"{here_address()}{as_owner(make)}")


def on_person(name: str, action: Callable[[Any, Session, User], object]) -> None:
    """Do something to the account of this name."""

    def change(session: Session, user: User) -> None:
        from app.web import people

        action(people, session, people.named(session, name))

    as_owner(change)


Name = Annotated[str, typer.Argument(help="Whose account.")]


@users.command("role")
@plainly
def set_user_role(name: Name, role: Annotated[str, typer.Argument(help="admin, member or viewer.")], data_dir: DataDir = None) -> None:
    """Give a person another role."""
    choose(data_dir=data_dir)
    on_person(name, lambda people, session, person: people.set_role(session, person, role))
    say(f"{name}: {role}.")


@users.command("disable")
@plainly
def disable_user(name: Name, data_dir: DataDir = None) -> None:
    """End a person's sessions and keys, and sign the person in no more."""
    choose(data_dir=data_dir)
    on_person(name, lambda people, session, person: people.disable(session, person))
    say(f"{name} is disabled.")


@users.command("enable")
@plainly
def enable_user(name: Name, data_dir: DataDir = None) -> None:
    """Let a person sign in again."""
    choose(data_dir=data_dir)

    def enable(people: Any, session: Session, person: User) -> None:
        from app.web import projects

        projects.let_in_again(session, person)

    on_person(name, enable)
    say(f"{name} may sign in again.")


@users.command("reset-two-step")
@plainly
def reset_two_step(name: Name, data_dir: DataDir = None) -> None:
    """Turn off two-step sign-in of a person who lost the app and the recovery codes."""
    choose(data_dir=data_dir)

    def reset(people: Any, session: Session, person: User) -> None:
        from app.web import two_step

        two_step.turn_off(session, person.id)

    on_person(name, reset)
    say(f"{name} signs in without a code.")


@users.command("hand-over")
@plainly
def hand_over(name: Name, to: Annotated[str, typer.Argument(help="Who gets everything of this person.")], data_dir: DataDir = None) -> None:
    """Give everything of a person who leaves to another one, and disable the account for good."""
    choose(data_dir=data_dir)

    def give(people: Any, session: Session, person: User) -> None:
        from app.web import projects

        projects.hand_over(session, person, people.named(session, to))

    on_person(name, give)
    say(f"{to} owns what {name} made; {name} is disabled.")
