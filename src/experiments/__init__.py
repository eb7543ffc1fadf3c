"""Hydra-configured PyTorch experiments: a config is an experiment, a run is a directory."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from experiments.saved import SavedRun, load_run

__all__ = ["SavedRun", "load_run"]


def __getattr__(name: str) -> Any:
    # at the first use, so that `python -m experiments --help` need not wait for them
    if name in __all__:
        from experiments import saved

        return getattr(saved, name)
    raise AttributeError(f"module 'experiments' has no attribute {name!r}")
