"""Neutrino directions from the pulses of IceCube: the names that most users start with, loaded on first use."""
__version__ = "0.1.0"

import os
import sys
from importlib import import_module
from types import ModuleType

# Threads that wait for each other spin, by default for milliseconds. Beside another busy program that makes
# a training step a hundred times slower. A short spin keeps nearly all of the speed of a quiet machine.
# OpenMP reads this once, when torch is loaded.
if "torch" not in sys.modules and "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")

_HOME = {
    "HierarchicalTransformer": "model",
    "DOMTransformer": "dom_transformer",
    "EventAccumulator": "accumulator",
    "EventTransformer": "event_transformer",
    "IceCubeDataset": "data",
    "collate_dom_packing": "packing",
    "split_batch": "packing",
    "train": "training",
    "evaluate": "evaluation",
    "mean_angular_error": "direction",
    "line_fit": "line_fit",
    "display_event": "display",
    "plot_event": "display",
    "EventBrowser": "browser",
    "simulate_dataset": "simulation.dataset",
    "Geometry": "geometry",
    "load_geometry": "geometry",
    "convert": "io.convert",
    "write_dataset": "io.writing",
}
__all__ = list(_HOME)


def __getattr__(name):
    "Import a name of `_HOME` from its module when it is first used (PEP 562)."
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps the function `iceaggr.line_fit` when the module of the same name is imported.

    Python stores each imported submodule as an attribute of its package. `from iceaggr.line_fit import ...`
    does not read that attribute, so it finds the module all the same."""

    def __setattr__(self, name, value):
        if name in _HOME and isinstance(value, ModuleType): return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
