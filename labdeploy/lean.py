"""Imports invoke, on which Fabric and paramiko stand, without what it takes along and nobody here uses.

invoke 2.2 imports `unittest.mock` for its `MockContext`, and with it asyncio: 40 of the 180 ms of processor
time that `import fabric` takes (CPython 3.11). Import this before either of them.
"""

from __future__ import annotations

import importlib
import sys
import types

MOCK = "unittest.mock"


def import_invoke() -> None:
    """Import invoke with an empty class in the place of Mock; as it is where somebody has either already."""
    if MOCK in sys.modules or "invoke" in sys.modules:
        return
    sys.modules[MOCK] = _stand_in()
    try:
        importlib.import_module("invoke")
    except ImportError:  # another invoke, which wants more of it
        for name in [name for name in sys.modules if name.partition(".")[0] == "invoke"]:
            del sys.modules[name]
    finally:
        del sys.modules[MOCK]


def _stand_in() -> types.ModuleType:
    module = types.ModuleType(MOCK)
    module.Mock = object  # type: ignore[attr-defined]
    return module


import_invoke()
