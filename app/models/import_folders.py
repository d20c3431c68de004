"""The folders below which a request may name a model to import."""

from __future__ import annotations

from pathlib import Path

from app.errors import BadField, Forbidden
from app.languages import gettext
from app.settings import get_settings


def import_folders() -> list[Path]:
    """The folders below which a request may name a model: `import` in the data folder and those of LUTHIER_IMPORT_DIRS."""
    settings = get_settings()
    named = [Path(part).expanduser() for part in settings.import_dirs.split(":") if part.strip()]
    return [settings.data_dir / "import", *named]


def import_folder(path: str, anywhere: bool = False) -> Path:
    """The folder of a path, with links resolved. Raises Forbidden when it is outside the import folders."""
    roots = [root.resolve() for root in import_folders()]
    try:
        if "\0" in path or not path.strip():
            raise ValueError
        folder = (Path(path).expanduser() if anywhere else roots[0] / path).resolve()
        folder.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long, a link to itself, a lone surrogate
        raise BadField(
            gettext("Give the path of a folder."), hint=gettext("It is the folder that holds config.json."), param="path"
        ) from None
    if not anywhere and not any(root in folder.parents for root in roots):
        raise Forbidden(
            gettext("A folder can be added from the browser only when it lies in an import folder."),
            hint=gettext(
                "Put it into %(folder)s, name its parent in LUTHIER_IMPORT_DIRS, or run `luthier models add FOLDER`.",
                folder=import_folders()[0],
            ),
            param="path",
            code="outside_import_folders",
        )
    return folder


def importable() -> list[Path]:
    """Folders with a config.json directly below the import folders, for the page's list."""
    found = (path.parent for root in import_folders() if root.is_dir() for path in sorted(root.glob("*/config.json")))
    return list(found)[:100]
