"""Where Hydra looks for configs besides the folder of the primary config.

The entries are added by the plugin in hydra_plugins, so that every way of composing (a run, a
sweep, a launcher's process, `--cfg`) finds the same files in the same order.
"""

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

PACKAGE = Path(__file__).parents[1]
# A wheel has conf/ inside the package; a clone or an editable install has it at the top level.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"

# (provider, path) of what the command line adds; empty for other programs that use Hydra
entries: list[tuple[str, str]] = []


def set_entries(config_dir: str | None, config_path: str | None) -> None:
    """Search in `--config-dir`, then in conf/, after the folder of the primary config."""
    entries.clear()
    if config_dir:
        entries.append(("command-line", f"file://{Path(config_dir).absolute()}"))
    if config_path:
        entries.append(("experiments", f"file://{CONF}"))


def make_conf_importable() -> None:
    """Let `pkg://experiments.conf` name conf/ in a clone, as it does in a wheel."""
    name = "experiments.conf"
    if CONF.parent == PACKAGE or name in sys.modules:
        return
    spec = spec_from_file_location(name, CONF / "__init__.py")
    if spec is not None:
        sys.modules[name] = module_from_spec(spec)
