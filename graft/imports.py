"""Import torch, transformers and what is built on them in less time."""

import gc
import importlib
import sys
from types import ModuleType


def import_heavy(name: str) -> ModuleType:
    """Import a module that may bring in torch and transformers; returns it.

    They make 400,000 objects that stay for good. Collections of garbage that look at them again and again take a fifth
    of the time, and the last one most of a second at exit. So there are none in between, and later ones leave out the
    objects that exist when a module has been imported for the first time, those of the program included. What is
    garbage before is collected.
    """
    if name in sys.modules:
        return importlib.import_module(name)
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()
