"""Hydra-configured PyTorch experiments: a config is an experiment, a run is a directory."""

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import TYPE_CHECKING, Any

from experiments.config.names import MOVED

if TYPE_CHECKING:
    from experiments.saved import SavedRun, load_run
    from experiments.training.objective import StepOutput

__all__ = ["SavedRun", "StepOutput", "load_run"]


def __getattr__(name: str) -> Any:
    # imported at first use, so that `python -m experiments --help` need not wait for them
    if name == "StepOutput":
        from experiments.training.objective import StepOutput

        return StepOutput
    if name in __all__:
        from experiments import saved

        return getattr(saved, name)
    raise AttributeError(f"module 'experiments' has no attribute {name!r}")


class MovedModules:
    """Imports moved modules under their old names, which users' code and saved configs still use;
    both names give the same module object. A finder and loader as importlib.abc describes them,
    whose import would take a tenth of the time of `--help`.
    """

    def find_spec(self, fullname: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(fullname, self) if fullname in MOVED else None  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """The import system makes the module that `exec_module` replaces."""

    def exec_module(self, module: ModuleType) -> None:
        # the import system returns the entry of sys.modules after executing a module
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


sys.meta_path.append(MovedModules())
