"""Where Hydra looks for configs besides the folder of the primary config.

The entries are added by the plugin in hydra_plugins, so that every way of composing (a run, a
sweep, a launcher's process, `--cfg`) finds the same files in the same order.
"""

import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from experiments.errors import UsageError

PACKAGE = Path(__file__).parents[1]
# A wheel has conf/ inside the package; a clone or an editable install has it at the top level.
CONF = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parents[1] / "conf"

# (provider, path) of what the command line adds; empty for other programs that use Hydra
entries: list[tuple[str, str]] = []


def config_directories(args: Namespace) -> list[Path]:
    """The directories with options: conf/, then --config-path and --config-dir. Raises UsageError
    if the last is none.
    """
    if args.config_dir and not Path(args.config_dir).is_dir():
        raise UsageError(f"--config-dir {args.config_dir}: no such directory")
    return [CONF, *(Path(name).absolute() for name in (args.config_path, args.config_dir) if name)]


def option_files(directories: Iterable[Path]) -> Iterator[Path]:
    """The YAML files in config directories, of primary configs and of options."""
    for directory in directories:
        for pattern in ("*.yaml", "*/*.yaml", "*/*/*.yaml"):
            yield from directory.glob(pattern)


def list_options(directories: Iterable[Path]) -> dict[str, list[str]]:
    """The options of every group in config directories: `{"optimizer": ["adam", ...]}`; a group
    inside another one is named like `model/net`. Without Hydra's own groups.
    """
    options: dict[str, set[str]] = {}
    for directory in directories:
        for file in option_files([directory]):
            group = file.relative_to(directory).parent.as_posix()
            if not group.startswith(("hydra/", ".")) and group != "hydra":
                options.setdefault(group, set()).add(file.stem)
    return {group: sorted(names) for group, names in sorted(options.items())}


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
