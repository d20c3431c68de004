"""Training configurations of other programs, read as orders of a job: the folder is the registry. A file here that defines a
`ConfigFormat` is understood by `luthier import`. Files that begin with an underscore hold what several formats share.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
from typing import Any

import yaml

from app.config_formats._base import ConfigFormat, Note, Translation
from app.errors import BadData

__all__ = ["FORMATS", "ConfigFormat", "Note", "Translation", "as_file", "read"]


def _scan() -> dict[str, ConfigFormat]:
    names = [module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_")]
    found = [importlib.import_module(f"{__name__}.{name}").FORMAT for name in names]
    return {one.name: one for one in sorted(found, key=lambda one: one.name)}


FORMATS: dict[str, ConfigFormat] = _scan()
"""Every format by name."""


def read(text: str) -> tuple[ConfigFormat, Translation]:
    """The format of a configuration in YAML or JSON, and what it orders here. Raises BadData for one that no format knows, and for
    what it asks for that cannot be trained here."""
    try:
        body = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise BadData(f"The file is neither YAML nor JSON: {str(error)[:200]}", hint="Fix the line it names.") from None
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise BadData("The file holds no settings.", hint="Name the configuration of a training run.")
    for one in FORMATS.values():
        if one.recognizes(body):
            return one, one.translate(body)
    raise BadData(
        f"The file is of no program that is known here; it begins with {', '.join(list(body)[:5])}.",
        hint=f"Known are configurations of {', '.join(one.title for one in FORMATS.values())}.",
    )


def as_file(found: ConfigFormat, translation: Translation) -> str:
    """The order as YAML for `luthier train`; what has no counterpart stands in it as comments."""
    lines = [f"# From a configuration of {found.title}. Run it: luthier train job.yaml"]
    lines += [
        f"# {note.key}: {json.dumps(note.value, ensure_ascii=False, default=str)[:200]}: {note.message}" for note in translation.notes
    ]
    ordered: dict[str, Any] = {key: translation.order[key] for key in ("model", "training_file") if key in translation.order}
    return "\n".join(lines) + "\n" + yaml.safe_dump(ordered | translation.order, sort_keys=False, allow_unicode=True, width=1000)
