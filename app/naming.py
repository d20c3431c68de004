"""Names and tags that a person gives to jobs, models, datasets and comparisons."""

from __future__ import annotations

from collections.abc import Iterable

from sqlalchemy.orm import Session

from app.datasets import service as datasets
from app.errors import BadField
from app.languages import gettext
from app.tables import Comparison, Dataset, Job, Model

Named = Job | Model | Dataset | Comparison
Tagged = Job | Model | Dataset

MAX_NAME_LENGTH = 200
MAX_TAGS = 10
MAX_TAG_LENGTH = 40


def rename(session: Session, found: Named, name: str) -> None:
    """Rename an object; for a model this is its title, since `model=` keeps its own name. All versions of a dataset are renamed,
    because lists show them as one. Raises BadField."""
    name = _text(name, "name", MAX_NAME_LENGTH)
    if isinstance(found, Model):
        found.title = name
    elif isinstance(found, Dataset):
        for version in datasets.line(session, found):
            version.name = name
    else:
        found.name = name


def tag(session: Session, found: Tagged, tags: Iterable[str]) -> None:
    """Replace its tags by these. Raises BadField."""
    kept = sorted({_text(one, "tags", MAX_TAG_LENGTH) for one in tags}, key=str.casefold)
    if any("," in one for one in kept):
        raise BadField(gettext("A tag has a comma in it."), hint=gettext("Write two tags."), param="tags")
    if len(kept) > MAX_TAGS:
        message = gettext("%(num)s tags are too many.", num=len(kept))
        raise BadField(message, hint=gettext("It may have %(most)s.", most=MAX_TAGS), param="tags")
    for version in datasets.line(session, found) if isinstance(found, Dataset) else [found]:
        version.tags = kept


def words(text: str) -> list[str]:
    """The tags in a text with commas between them."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _text(text: str, param: str, longest: int) -> str:
    """One printable line. Raises BadField."""
    line = " ".join(text.split())
    is_name = param == "name"
    if not line:
        raise BadField(gettext("The name is empty.") if is_name else gettext("A tag is empty."), hint=gettext("Write a word."), param=param)
    if len(line) > longest:
        said = (
            gettext("The name has %(num)s characters.", num=len(line))
            if is_name
            else gettext("A tag has %(num)s characters.", num=len(line))
        )
        raise BadField(said, hint=gettext("It may have %(most)s.", most=longest), param=param)
    if not line.isprintable():
        said = (
            gettext("The name has a character that cannot be shown.") if is_name else gettext("A tag has a character that cannot be shown.")
        )
        raise BadField(said, hint=gettext("Remove it."), param=param)
    return line
