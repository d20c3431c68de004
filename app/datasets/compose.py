"""Datasets made of others: concatenated, mixed by weights, drawn at random, freed of repetitions, or converted.

    order ─→ a new version with its lineage, `reading` ─→ the data worker writes its file (`app/datasets/compose_rows.py`) and parses it

The result is a dataset like any other: it has a file of its own, so it can be fixed, downloaded and combined again. Its
`origin` names every source with its version and the hash of its rows, so the same order always gives the same rows.
"""

from __future__ import annotations

import uuid
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from sqlalchemy.orm import Session

from app import formats, queue
from app.datasets import compose_rows, versions
from app.datasets import service as datasets
from app.errors import BadField, Conflict
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import english, gettext, lowered, ngettext
from app.tables import Dataset, User

Operation = Literal["concatenate", "mix", "sample", "deduplicate", "convert"]
MAX_SOURCES, MAX_ROWS = 20, 5_000_000


class MixturePart(BaseModel):
    """One dataset of a combination, and its weight in a mixture."""

    model_config = ConfigDict(extra="forbid")
    dataset: str = Field(description="Its id.")
    weight: float = Field(
        default=1.0, gt=0, le=1e6, allow_inf_nan=False, description="Its share of a mixture, relative to the weights of the others."
    )


def _bare_id(value: Any) -> Any:
    return {"dataset": value} if isinstance(value, str) else value


Source = Annotated[MixturePart, BeforeValidator(_bare_id, json_schema_input_type=str | MixturePart)]
"""A dataset and its weight, or its id alone."""


class CombineRequest(BaseModel):
    """What to make, and of what."""

    model_config = ConfigDict(extra="forbid")
    operation: Operation
    datasets: Annotated[list[Source], Field(min_length=1, max_length=MAX_SOURCES)]
    rows: int | None = Field(
        default=None, ge=1, le=MAX_ROWS, description="Rows of a mixture or a sample; a mixture takes as many as it can."
    )
    seed: int = Field(default=42, ge=0, le=2**31 - 1, description="Decides which rows are drawn, and the order of a mixture.")
    repeat: bool = Field(default=False, description="Whether rows of a dataset that is too small for its share may come several times.")
    near: bool = Field(default=False, description="Whether near duplicates are removed too.")
    format: str | None = Field(default=None, description="What a conversion makes of the rows.")
    name: str | None = Field(default=None, max_length=200)


def order(session: Session, user: User, wish: CombineRequest) -> Dataset:
    """A new version of the first dataset, made from all of them by the data worker.

    Raises BadField where the datasets or numbers do not match, Conflict for one that is not ready.
    """
    parts = [(datasets.get(session, user, ids.parse(ids.DATASET, part.dataset, param="datasets")), part.weight) for part in wish.datasets]
    found = [dataset for dataset, _ in parts]
    _check_sources(found, wish)
    shape = _shape(found, wish)
    rows = _rows(found, [weight for _, weight in parts], wish)
    first = found[0]
    with english():  # it is stored
        converted = conversions(found, shape)
    new = Dataset(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        parent_id=first.id,
        name=((wish.name or "").strip() or first.name)[:200],
        version=versions.next_number(session, first),
        format=shape,
        format_chosen=True,
        mapping=compose_rows.MAPPINGS[shape],
        status="reading",
        origin={
            "operation": wish.operation,
            "from": ids.public(ids.DATASET, first.id),
            "sources": [_source(dataset, weight) for dataset, weight in parts],
            "shape": shape,
            "rows": rows,
            "seed": wish.seed,
            "near": wish.near,
            "converted": converted,
        },
    )
    session.add(new)
    session.flush()
    queue.enqueue(session, queue.READ, new.id)
    session.refresh(new)
    return new


def _source(dataset: Dataset, weight: float) -> dict[str, Any]:
    return {
        "dataset": ids.public(ids.DATASET, dataset.id),
        "name": dataset.name,
        "version": dataset.version,
        "path": dataset.rows_path,
        "sha256": dataset.rows_sha256,
        "shape": shape_of(dataset),
        "size": dataset.good_rows,
        "weight": weight,
    }


def shape_of(dataset: Dataset) -> str:
    return formats.get(dataset.format or "").shape


def _check_sources(found: list[Dataset], wish: CombineRequest) -> None:
    for dataset in found:
        if dataset.status != "ready" or not dataset.rows_path or not dataset.good_rows:
            if dataset.status == "ready":
                said = gettext("The dataset %(name)s has no valid rows.", name=dataset.name)
            else:
                said = gettext("The dataset %(name)s is %(status)s.", name=dataset.name, status=gettext(dataset.status))
            raise Conflict(said, hint=gettext("Wait until it is ready, or exclude it."))
    if wish.operation in ("sample", "convert") and len(found) > 1:
        if wish.operation == "sample":
            said = gettext("Only one dataset can be sampled at a time, and %(count)s were chosen.", count=len(found))
        else:
            said = gettext("Only one dataset can be converted at a time, and %(count)s were chosen.", count=len(found))
        raise BadField(said, hint=gettext("Choose one, or combine several first."), param="datasets")
    if wish.operation in ("concatenate", "mix") and len(found) < 2:
        raise BadField(gettext("Combining needs at least two datasets."), hint=gettext("Choose another one."), param="datasets")


def _shape(found: list[Dataset], wish: CombineRequest) -> str:
    """The shape of the result's rows. Raises BadField where the datasets have no common shape without a loss."""
    shapes = [shape_of(dataset) for dataset in found]
    if wish.operation != "convert":
        common = compose_rows.common_shape(shapes)
        if common is None:
            named = "; ".join(
                gettext("%(name)s is %(format)s", name=dataset.name, format=_title(shape))
                for dataset, shape in zip(found, shapes, strict=True)
            )
            raise BadField(
                gettext("These datasets have different formats, and none converts to another without loss: %(formats)s.", formats=named),
                hint=gettext("Choose datasets of one format, or convert one of them first; the result lists what was lost."),
                param="datasets",
            )
        return common
    wanted = formats.get(wish.format).shape if wish.format else ""
    if wanted == shapes[0] or compose_rows.conversion(shapes[0], wanted) is None:
        able = ", ".join(
            name for name in compose_rows.MAPPINGS if name != shapes[0] and compose_rows.conversion(shapes[0], name)
        ) or gettext("nothing else")
        raise BadField(
            gettext("Rows in the format %(format)s can be converted to %(formats)s.", format=_title(shapes[0]), formats=able),
            hint=gettext("Send format with one of these."),
            param="format",
        )
    return wanted


def conversions(found: list[Dataset], shape: str) -> list[str]:
    """The conversions of the datasets that are not of this shape yet, in words."""
    words = []
    for dataset in found:
        own = shape_of(dataset)
        how = compose_rows.conversion(own, shape)
        if own != shape and how is not None:
            words.append(f"{dataset.name}, {_title(own)} to {_title(shape)}: {how.words}.")
    return words


def _title(shape: str) -> str:
    return lowered(gettext(formats.FORMATS[shape].title))


def _rows(found: list[Dataset], weights: list[float], wish: CombineRequest) -> int | None:
    """Number of rows to sample; None where all are used. Raises BadField for more than there are."""
    sizes = [dataset.good_rows or 0 for dataset in found]
    if wish.operation == "sample":
        if wish.rows is None:
            hint = gettext("Send rows, 1 to %(most)s.", most=human_number(sizes[0]))
            raise BadField(gettext("The number of rows to sample is missing."), hint=hint, param="rows")
        if wish.rows > sizes[0]:
            said = ngettext(
                "%(name)s has %(num)s row, fewer than %(wanted)s.",
                "%(name)s has %(num)s rows, fewer than %(wanted)s.",
                sizes[0],
                name=found[0].name,
                wanted=human_number(wish.rows),
            )
            raise BadField(said, hint=gettext("Sample fewer."), param="rows")
        return wish.rows
    if wish.operation != "mix":
        return None
    most = compose_rows.most_rows(weights, sizes)
    if wish.rows is None:
        if most < 1:
            hint = gettext("Choose weights that are closer together.")
            raise BadField(gettext("At these weights no row can be used."), hint=hint, param="datasets")
        return min(most, MAX_ROWS)
    for dataset, size, count in zip(found, sizes, compose_rows.shares(weights, wish.rows), strict=True):
        if count > size and not wish.repeat:
            raise BadField(
                gettext(
                    "%(rows)s rows at these weights take %(count)s of %(name)s, which has %(size)s.",
                    rows=human_number(wish.rows),
                    count=human_number(count),
                    name=dataset.name,
                    size=human_number(size),
                ),
                hint=gettext("Ask for at most %(most)s rows, or allow repeated rows.", most=human_number(most)),
                param="rows",
            )
    return wish.rows
