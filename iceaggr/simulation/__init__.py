"""Simulated events: neutrinos, their light, the read-out, and data sets made of them."""
from importlib import import_module

_HOMES = {
    "SimulationSettings": "neutrinos",
    "demo_dataset": "dataset",
    "simulate_dataset": "dataset",
    "simulate_events": "dataset",
}
__all__ = list(_HOMES)


def __getattr__(name):
    "Import a name when it is first used, so that importing the package stays cheap."
    if name in _HOMES: return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__():
    return sorted([*globals(), *_HOMES])
