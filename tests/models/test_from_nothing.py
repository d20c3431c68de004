"""Models with random weights, written by the studio itself."""

from __future__ import annotations

import pytest

from app.db import transaction
from app.errors import BadField
from app.models import from_nothing
from app.models.from_nothing import BlankSize
from app.settings import get_settings


def test_a_request_that_is_refused_leaves_no_folder(user, data_dir) -> None:
    size = BlankSize(hidden=64, layers=1)
    with pytest.raises(BadField), transaction() as session:
        assert (data_dir / str(from_nothing.ensure(session, user, size).path) / "model.safetensors").is_file()
        raise BadField("Something else of the request was wrong.", param="rows")
    assert not list(get_settings().folder("models").iterdir())
    with transaction() as session:
        made = from_nothing.ensure(session, user, size)
    assert (data_dir / str(made.path)).is_dir()
