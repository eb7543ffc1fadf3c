"""Export a run's model to a file that needs only torch: `python -m experiments.export DIR`.

The program in it takes rows as the data's files hold them, with any number of rows: pixels as
bytes, the numbers of a table as they are, and scales them as training did. Elsewhere:
`torch.export.load(FILE).module()(x)`.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from experiments import stdio
from experiments.directory import durable
from experiments.directory.paths import display_path
from experiments.errors import UsageError, exit_with_usage_error
from experiments.evaluate import rows_of

if TYPE_CHECKING:
    from experiments.saved import SavedRun
    from experiments.training.program import Call, Program


def main() -> None:
    """Parse the command line and export."""
    stdio.protect(ignore_closed_pipes=True)
    parser = argparse.ArgumentParser("python -m experiments.export", description=__doc__)
    parser.add_argument("run", type=Path, help="the directory of a run")
    parser.add_argument("--checkpoint", choices=("best", "last"), default="best")
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE",
                        help="a module that the saved config may use")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE",
                        help="a name that ends in .pt2; default: model-CHECKPOINT.pt2 in the run's "
                        "directory")  # fmt: skip
    parser.error = partial(exit_with_usage_error, "experiments.export")  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        file, metadata = export_run(args.run, args.checkpoint, args.trust, args.output)
    except UsageError as error:
        exit_with_usage_error("experiments.export", str(error))
    print(as_text(metadata))
    print(display_path(file))


def export_run(
    path: Path,
    checkpoint: Literal["best", "last"],
    trust: Sequence[str] = (),
    output: Path | None = None,
) -> tuple[Path, dict[str, Any]]:
    """Write the model of a run's checkpoint to a file, after reading it back and comparing it with
    the model on validation rows; returns the file and its metadata.

    Raises UsageError, and writes nothing, if the run cannot be read, its model cannot be exported
    or the exported one computes something else.
    """
    file = path / f"model-{checkpoint}.pt2" if output is None else output
    if file.suffix != ".pt2":
        raise UsageError(f"--output {file}: expected a name that ends in .pt2")
    if output is not None and not file.parent.is_dir():
        raise UsageError(f"--output {file}: there is no folder {file.parent}; create it")

    from experiments.saved import load_run

    saved = load_run(path, checkpoint, trust)

    from experiments.training.exporting import as_file, check_file
    from experiments.training.parts import collate_of
    from experiments.training.program import Program, encoders_of, model_calls

    target = f"model._target_={saved.config['model']['_target_']}"
    rows = rows_of(saved, "valid")
    calls = model_calls(target, saved.objective, rows, collate_of(saved.config))
    program = Program(saved.model, encoders_of(calls, saved.statistics), calls[0]).eval()
    metadata = metadata_of(saved, checkpoint, program, calls[0])
    content = as_file(target, program, calls, json.dumps(metadata, indent=2))
    check_file(target, program, calls, content)
    try:
        durable.write(file, content)
    except OSError as error:
        raise UsageError(
            f"--output {file}: cannot be written ({error.strerror}); name a file elsewhere"
        ) from None
    return file, metadata


def metadata_of(
    saved: "SavedRun", checkpoint: str, program: "Program", call: "Call"
) -> dict[str, Any]:
    """What a program's reader must know: a JSON value.

    call: of the model, from which the shapes are read
    """
    import torch

    from experiments.directory.environment import packages
    from experiments.directory.fingerprint import fingerprint
    from experiments.training.exporting import described
    from experiments.training.program import raw_arguments, repeatable

    args, kwargs = raw_arguments(call, program.encoders)
    with torch.no_grad(), repeatable():
        outputs = program(*args, **kwargs)
    inputs = described([*args, *kwargs.values()], program.names, call.rows)
    tensors = [isinstance(leaf, torch.Tensor) for leaf in call.leaves]
    for entry, encoder in zip(
        inputs.values(), itertools.compress(program.encoders, tensors), strict=True
    ):
        if hasattr(encoder, "meaning"):
            entry["values"] = encoder.meaning
    return {
        "run": saved.path.resolve().name,
        "checkpoint": checkpoint,
        "step": saved.step,
        "model": saved.config["model"]["_target_"],
        "weights": fingerprint(saved.model.state_dict()),
        "inputs": inputs,
        "outputs": described([outputs], ["outputs"], call.rows),
        **learnt(saved.statistics),
        "packages": packages(),
    }


def learnt(statistics: Any) -> dict[str, Any]:
    """What a data set learnt from its training rows, as a program's user needs it: the classes, the
    columns of a table and the codes of its categories, or the statistics of any other data.
    """
    if not isinstance(statistics, dict):
        return {} if statistics is None else {"statistics": statistics}
    if "target" not in statistics or "categories" not in statistics:
        classes = statistics.get("classes")
        return {"statistics": statistics} if classes is None else {"classes": classes}
    from experiments.data.columns import MISSING, UNKNOWN, first_code

    first, filled = first_code(statistics), statistics["missing"] == "fill"
    categories = {
        name: {
            "codes": {text: code for code, text in enumerate(known, first)},
            "unknown": UNKNOWN,
            "missing": MISSING if filled else None,
        }
        for name, known in statistics["categories"].items()
    }
    return {
        "target": statistics["target"]["name"],
        "classes": statistics["target"]["classes"],
        "numbers": [*statistics["numbers"]],
        "categories": categories,
        "missing_numbers": "NaN" if filled else None,
    }


def as_text(metadata: dict[str, Any]) -> str:
    """What a program takes and returns, a line each, for the terminal."""
    lines = [f"{metadata['checkpoint']} checkpoint (step {metadata['step']})"]
    for word, key in (("takes", "inputs"), ("returns", "outputs")):
        for name, entry in metadata[key].items():
            shape = ", ".join(map(str, entry["shape"]))
            values = f", {entry['values']}" if "values" in entry else ""
            lines.append(f"{word:7}  {name}: {entry['dtype']} ({shape}){values}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
