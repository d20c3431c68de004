"""The registry of export formats: the folder itself. A file here that defines an `ExportFormat` is offered by the page and the API; the
file of the same name in `worker/exporters/` writes it. Files that begin with an underscore hold what several formats share.
"""

from __future__ import annotations

import importlib
import pkgutil

from app.errors import BadField
from app.export_formats._base import PART, ExportFormat, ModelFacts
from app.languages import gettext

__all__ = ["FORMATS", "PART", "ExportFormat", "ModelFacts", "get"]


def _scan() -> dict[str, ExportFormat]:
    found = []
    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_"):
            found.append(importlib.import_module(f"{__name__}.{module.name}").FORMAT)
    return {one.name: one for one in sorted(found, key=lambda one: (one.place, one.name))}


FORMATS: dict[str, ExportFormat] = _scan()
"""Every export format by name, in the order in which the page shows them."""


def get(name: str) -> ExportFormat:
    """The format with this name. Raises BadField."""
    if name not in FORMATS:
        hint = gettext("Use one of %(names)s.", names=", ".join(FORMATS))
        raise BadField(gettext("“%(name)s” is not an export format.", name=name[:40]), hint=hint, param="format")
    return FORMATS[name]
