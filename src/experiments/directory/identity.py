"""What the bits of a run depend on besides its config: own code and versions. Imports no torch.

Own code is every file of a module outside the standard library, site-packages and this package
that a run can execute: the modules that its config names, those of --resolvers, and what both
import. The files are found and parsed, not imported.
"""

import ast
import functools
import hashlib
import os
import platform
import re
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

from experiments.config.names import KEEP_CHANGED, flatten, resolver_modules

# Their versions decide the bits of every run; others count where a run's own code imports them.
COMPUTING = ("experiments", "numpy", "torch")
DOTTED = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)+")
OURS = ("experiments", "hydra_plugins")


def identify(
    config: Mapping[str, Any], record: Mapping[str, Any] | None = None
) -> dict[str, dict[str, str]]:
    """The identity of a run of this config, started now.

    record: the run.json of a run that is read back, whose modules of --resolvers count instead of
        those of this command. A saved config is resolved, so that none need be given again.
    code: the sha256 of each own module, by its dotted name. versions: of Python and of the
    packages that compute. init: the sha256 of the weights to start from, if there are any.
    """
    modules = resolver_modules() if record is None else map(str, record.get("resolvers", ()))
    found = _identify((*dotted_names(config), *modules))
    if not starts_from_weights(config):
        return found
    from experiments.directory.initial import source_digests

    return {**found, "init": source_digests(config["init"])}


def starts_from_weights(config: Mapping[str, Any]) -> bool:
    """Whether a config's `init` names weights to start from."""
    init = config.get("init", {})
    return bool(init.get("run") or init.get("file"))


def check_source(config: Mapping[str, Any]) -> None:
    """Raise UsageError if the weights that a config starts from are not there."""
    if starts_from_weights(config):
        from experiments.directory.initial import source_file

        source_file(config["init"])


@functools.cache  # a module that this process has imported stays as it was then
def _identify(names: tuple[str, ...]) -> dict[str, dict[str, str]]:
    from importlib import metadata  # 10 ms, which the parent of a sweep need not wait for

    code, imported = own_modules(names)
    versions = {"python": platform.python_version()}
    versions |= {name: metadata.version(name) for name in COMPUTING}
    packages = distributions() if imported else {}
    for name in sorted(imported):
        versions |= {package: metadata.version(package) for package in packages.get(name, ())}
    return {
        "code": {
            name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in code.items()
        },
        "versions": versions,
    }


def differences(record: Mapping[str, Any], now: Mapping[str, Mapping[str, str]]) -> list[str]:
    """How a run's recorded identity differs from that of now, a phrase each.

    now: as from `identify`, and `data` where the rows are known. Weights that are not there any
    more are no difference to a run that has started from them.
    """
    rows, init = record.get("data", {}), record.get("init", {})
    return [
        *code_changes(record, now["code"]),
        *version_changes(record, now["versions"]),
        *(
            f"the {split} rows have changed"
            for split, digest in now.get("data", {}).items()
            if split in rows and rows[split] != digest
        ),
        *(
            f"{name} has other weights"
            for name, digest in now.get("init", {}).items()
            if init.get(name, digest) != digest
        ),
    ]


def code_changes(record: Mapping[str, Any], code: Mapping[str, str]) -> list[str]:
    """The own source files that are not those of a run, a phrase each."""
    before = record.get("code", {})
    reasons = {name: "was not recorded" for name in code if name not in before}
    reasons |= {name: "has changed" for name in code if before.get(name, code[name]) != code[name]}
    reasons |= {name: "is not used any more" for name in before if name not in code}
    return [f"{name.replace('.', '/')}.py {reason}" for name, reason in reasons.items()]


def version_changes(record: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    """The versions that are not those of a run, a phrase each."""
    before = record.get("versions")
    if before is None:  # a record of a time before they were kept
        packages = {"python": record["python"], **record["packages"]}
        before = {name: packages.get(name, version) for name, version in versions.items()}
    return [
        f"{name} was {before.get(name, 'missing')}, is {versions.get(name, 'missing')}"
        for name in {**before, **versions}
        if before.get(name) != versions.get(name)
    ]


def keep_changed() -> bool:
    """Whether runs are kept although their code, data or versions have changed."""
    return KEEP_CHANGED in os.environ


def dotted_names(config: Mapping[str, Any]) -> Iterator[str]:
    """The values of a nested config that may name something in a module."""
    for _, value in flatten(config):
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, dict):
                yield from dotted_names(item)
            elif isinstance(item, str) and DOTTED.fullmatch(item):
                yield item


def own_modules(names: Sequence[str]) -> tuple[dict[str, Path], set[str]]:
    """The own modules that dotted names lead to, with all that they import, by name; and the
    top-level names of other packages that they import.
    """
    found: dict[str, Path] = {}
    others: set[str] = set()
    waiting = list(names)
    while waiting:
        parts = waiting.pop().split(".")
        for count in range(1, len(parts) + 1):
            name = ".".join(parts[:count])
            if name in found:
                continue
            spec = find_module(name)
            if spec is None:
                break
            if not is_own(spec):
                others.add(parts[0])
                break
            if (file := source_file(spec)) is not None:
                found[name] = file
                waiting += imports(file, spec)
    return dict(sorted(found.items())), others - sys.stdlib_module_names - set(OURS)


def find_module(name: str) -> ModuleSpec | None:
    """Where a module would be imported from; nothing is imported for it."""
    parent, _, leaf = name.rpartition(".")
    path = None
    if parent:
        package = find_module(parent)
        if package is None or package.submodule_search_locations is None:
            return None
        path = list(package.submodule_search_locations)
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        try:
            spec: ModuleSpec | None = find(name, path) if find is not None else None
        except KeyError:  # a folder without __init__.py in another, which is not imported
            spec = ModuleSpec(name, None, is_package=True)
            spec.submodule_search_locations = [f"{place}/{leaf}" for place in path or ()]
        if spec is not None:
            return spec
    return None


def is_own(spec: ModuleSpec) -> bool:
    """Whether a module is a person's own: not installed, not part of Python."""
    if spec.name.partition(".")[0] in OURS:
        return False
    if spec.origin is None:
        places = [Path(place) for place in spec.submodule_search_locations or ()]
    elif spec.has_location:
        places = [Path(spec.origin)]
    else:  # built in
        return False
    return not any(map(is_installed, places))


def source_file(spec: ModuleSpec) -> Path | None:
    """The file that a module is read from, an archive if it is in one; None for a folder without
    an __init__.py.
    """
    file = Path(spec.origin or "")
    return next((place for place in (file, *file.parents) if place.is_file()), None)


def is_installed(place: Path) -> bool:
    """Whether a file or folder belongs to the standard library or to an installed package."""
    place = place.resolve()
    library = (Path(sysconfig.get_path(name)) for name in ("stdlib", "platstdlib"))
    in_library = any(place.is_relative_to(folder.resolve()) for folder in library)
    return in_library or not {"site-packages", "dist-packages"}.isdisjoint(place.parts)


@functools.cache
def distributions() -> Mapping[str, list[str]]:
    """The installed distributions of each top-level name that can be imported."""
    from importlib import metadata

    return metadata.packages_distributions()


def imports(file: Path, spec: ModuleSpec) -> Iterator[str]:
    """The dotted names that a source file imports, anywhere in it, and those that it may import
    by `import_module("name")`.
    """
    try:
        tree = ast.parse(file.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return  # importing it fails, and says why
    package = spec.name if spec.submodule_search_locations else spec.name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            module = ".".join(
                [*(above if node.level else ()), *([node.module] if node.module else ())]
            )
            # a name may be a module of a package
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and node.args:
            called, argument = ast.unparse(node.func), node.args[0]
            if called.endswith(("import_module", "__import__")) and isinstance(
                argument, ast.Constant
            ):
                yield str(argument.value)
