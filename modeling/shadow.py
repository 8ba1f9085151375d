"""Let `import profile` and `import evaluate` find the real modules, although our scripts have the same names.

A script's folder comes first on sys.path. Our profile.py therefore hides the standard library's profile,
which torch needs through cProfile. Our evaluate.py hides the evaluate package. Both scripts begin with a call
to load_real.
"""

import importlib.util
import sys
from importlib.machinery import PathFinder
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def load_real(name: str) -> None:
    """Load the module `name` from sys.path without this project's root, and store it in sys.modules[name].

    ModuleNotFoundError: only this project has a module of that name.
    """
    elsewhere = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]
    spec = PathFinder.find_spec(name, elsewhere)
    if spec is None:
        raise ModuleNotFoundError(f"No module named {name!r} except this project's script", name=name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
