"""The declarative base, column shorthands, and the columns of rows that are leased."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, ForeignKey, MetaData, Text, func
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.types import DateTime

JSON = dict[str, Any]


class Base(DeclarativeBase):
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        JSON: JSONB(none_as_null=True),  # None is NULL and not JSON null
        list[Any]: JSONB(none_as_null=True),
        str: Text,
        int: BigInteger,
        datetime: DateTime(timezone=True),
    }


def new_key() -> Mapped[uuid.UUID]:
    return mapped_column(primary_key=True, default=uuid.uuid4)


def now() -> Mapped[datetime]:
    return mapped_column(server_default=func.clock_timestamp())


def of_project(**more: Any) -> Any:
    """The project that a row belongs to; where none is named, its maker's own, which has the maker's id."""
    return mapped_column(ForeignKey("projects.id"), default=lambda context: context.get_current_parameters().get("owner_id"), **more)


class Leased:
    """Rows that one worker at a time holds, by the protocol of `app/leases.py`."""

    id: Mapped[uuid.UUID] = new_key()
    status: Mapped[str]
    fence: Mapped[int] = mapped_column(server_default="0", comment="rises with every claim; stale writers are refused by it")
    deaths: Mapped[int] = mapped_column(server_default="0", comment="workers that died over it since it last got on")
    lease_until: Mapped[datetime | None]
