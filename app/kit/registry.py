"""A registry is a folder: each file defines one class of a kind, and a new file needs no edit elsewhere."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from types import ModuleType
from typing import Any


def classes_in(package: str, base: Any) -> list[Any]:
    """Concrete subclasses of `base` that the modules of `package` define, in the order of their file names. Modules that begin with an
    underscore hold what several of them share, and are left out."""
    names = sorted(module.name for module in pkgutil.iter_modules(importlib.import_module(package).__path__))
    modules = (importlib.import_module(f"{package}.{name}") for name in names if not name.startswith("_"))
    return [cls for module in modules for cls in classes_in_module(module, base)]


def classes_in_module(module: ModuleType, base: Any) -> list[Any]:
    """Concrete subclasses of `base` that a module defines itself."""
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, base) and value.__module__ == module.__name__ and not inspect.isabstract(value)
    ]
