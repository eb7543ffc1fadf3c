"""The layers of the package, top first, and who imports whom, read from the sources.

`python docs/floors.py` draws docs/floors.svg; tests/test_architecture.py checks the rules.
"""

import ast
from collections.abc import Iterator
from html import escape
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "src" / "experiments"
PICTURE = Path(__file__).with_name("floors.svg")

# Top-level modules and packages. A module imports from its own floor or from those below it.
FLOORS = [
    ("commands", ("__init__", "__main__", "launch", "reproduce", "evaluate", "export", "compare")),
    ("sweeps", ("sweeps",)),
    ("job", ("job",)),
    ("train", ("train", "saved")),
    ("recipes", ("recipes",)),
    ("results", ("results",)),
    ("compiled", ("compiled",)),
    ("training", ("training",)),
    ("data", ("data",)),
    ("directory", ("directory",)),
    ("config", ("config",)),
    ("errors", ("interrupt", "stdio", "errors")),
]

ROW, WIDTH, LEFT, BOX = 46, 900, 210, 560  # pixels


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name: `training.fit`, `data.__init__`."""
    return {
        ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
        for file in sorted(PACKAGE.rglob("*.py"))
    }


def imports(file: Path) -> Iterator[str]:
    """The modules of the package that a file imports anywhere in it, dotted as in `modules`."""
    known = modules()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("experiments"):
            module = (node.module or "").partition("experiments")[2].lstrip(".")
            for alias in node.names:
                dotted = f"{module}.{alias.name}".lstrip(".")
                # a submodule, a name in a module, or a name in a package's __init__
                yield next(
                    name
                    for name in (dotted, f"{dotted}.__init__", module, f"{module}.__init__")
                    if name in known
                )


def graph() -> dict[str, set[str]]:
    """Each module with the modules that it imports."""
    return {name: set(imports(file)) - {name} for name, file in modules().items()}


def floor_of(module: str) -> int:
    """The number of a module's floor, 0 at the top. Raises StopIteration where it has none."""
    top = module.partition(".")[0]
    return next(number for number, (_, members) in enumerate(FLOORS) if top in members)


def draw() -> str:
    """The floors as an SVG: a box each with its modules, and an arc for each pair that imports."""
    pairs: dict[tuple[int, int], int] = {}
    for module, imported in graph().items():
        for other in imported:
            pair = (floor_of(module), floor_of(other))
            pairs[pair] = pairs.get(pair, 0) + (pair[0] != pair[1])
    height = ROW * len(FLOORS) + 20
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" '
        f'viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
    ]
    for (upper, lower), count in sorted(pairs.items()):
        if count:
            start, end = 10 + ROW * upper + 25, 10 + ROW * lower + 15
            bulge = LEFT - 22 * (lower - upper)
            parts.append(
                f'<path d="M {LEFT} {start} C {bulge} {start}, {bulge} {end}, {LEFT} {end}" '
                f'fill="none" stroke="#5b7ea8" stroke-width="{min(1 + count / 4, 4):g}" '
                f'opacity="0.6"><title>{count} imports</title></path>'
            )
    for number, (name, members) in enumerate(FLOORS):
        y = 10 + ROW * number
        inside = [m for m in modules() if m.partition(".")[0] in members]
        text = ", ".join(m.rpartition(".")[2] for m in inside if m not in (f"{name}.__init__",))
        parts += [
            f'<rect x="{LEFT}" y="{y}" width="{WIDTH - LEFT - 10}" height="{ROW - 8}" rx="6" '
            'fill="#eef3f9" stroke="#5b7ea8"/>',
            f'<text x="{LEFT + 12}" y="{y + 24}" font-size="15" font-weight="bold">{name}</text>',
            f'<text x="{LEFT + 110}" y="{y + 24}" font-size="12">{escape(text)}</text>',
        ]
    return "\n".join([*parts, "</svg>\n"])


if __name__ == "__main__":
    PICTURE.write_text(draw())
    print(PICTURE)
