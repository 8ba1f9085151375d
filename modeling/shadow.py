"""Lets `import profile` and `import evaluate` find the real modules beside our scripts of those names.

A script's folder comes first on sys.path, so the root's profile.py stands before the standard library's, which cProfile and
with it torch import, and evaluate.py before the package. Our two scripts therefore begin with a call to this.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_real(name: str) -> None:
    """Execute the module `name` that stands elsewhere on sys.path than in this project's root, and make it sys.modules[name]."""
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r} but this project's script", name=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
