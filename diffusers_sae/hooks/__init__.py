"""Hooks on the modules of a pipeline, and the state of a run that they act for."""

from .attachment import SAEProcessor
from .calls import as_run, is_run, run_of
from .current import current_run
from .module_run import ModuleRun, Observer
from .run import SteeringRun
from .sae_run import LoadedSAE, SAERun
from .state import SteeringState

__all__ = [
    "LoadedSAE",
    "ModuleRun",
    "Observer",
    "SAEProcessor",
    "SAERun",
    "SteeringRun",
    "SteeringState",
    "as_run",
    "current_run",
    "is_run",
    "run_of",
]
