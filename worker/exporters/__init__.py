"""The registry of exporters: the folder itself. A file here with an object `EXPORTER` writes one export format; what the format is
called, its types and which models it takes are in the file of the same name in `app/export_formats/`, which the page and the API read.
Files that begin with an underscore hold what several exporters share.
"""

from __future__ import annotations

import importlib
import pkgutil

from worker.exporters._base import Exporter


def get(name: str) -> Exporter:
    """The exporter of one format; its file is imported here, since each needs libraries of its own."""
    return importlib.import_module(f"{__name__}.{name}").EXPORTER


def names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
