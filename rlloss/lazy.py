"""Import the names of a package when they are first used."""

import importlib
from collections.abc import Callable
from typing import Any


def attach(
    package: str, modules: dict[str, str], folders: tuple[str, ...] = ()
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return (`__getattr__`, `__dir__`, `__all__`) for a package (PEP 562). modules maps a name to the module that
    defines it; folders are the packages inside it."""

    def get(name: str) -> Any:
        if name in folders:
            return importlib.import_module(f"{package}.{name}")
        if name not in modules:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = getattr(importlib.import_module(modules[name]), name)
        setattr(importlib.import_module(package), name, found)  # the next access does not come here
        return found

    return get, lambda: sorted({*vars(importlib.import_module(package)), *modules, *folders}), list(modules)
