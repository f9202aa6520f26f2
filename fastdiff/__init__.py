"""fastdiff: a kernel-backed sampling engine for diffusion and flow models.

Importing it only defines names; each loads its module when it is first used.
"""

import ast
import importlib
from pathlib import Path

__version__ = "0.1.0"


def _modules() -> dict[str, str]:
    """Public name -> module, from the imports of `__init__.pyi`, which type checkers read as well."""
    tree = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))
    return {name.name: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names}


_MODULES = _modules()


def __getattr__(name: str) -> object:
    """A public name, or a module of the package, on its first use."""
    if name in _MODULES:
        globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
        return globals()[name]
    try:
        return importlib.import_module(f"fastdiff.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"fastdiff.{name}":
            raise
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}") from None


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})


# FastdiffConfig needs diffusers
__all__ = sorted(_MODULES.keys() - {"FastdiffConfig"})
