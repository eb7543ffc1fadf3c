"""Repeat a saved run and compare every number: `python -m experiments.reproduce DIR`.

The exit code is 0 only if numbers and weights are identical, or equal within `--rtol`.
"""

import argparse
import math
import signal
import sys
from datetime import datetime
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from experiments import job, stdio
from experiments.directory.claim import claim
from experiments.directory.identity import check_source, code_changes, identify
from experiments.directory.metrics import read_metrics
from experiments.directory.paths import display_path
from experiments.directory.record import read_record, start
from experiments.directory.saved_config import read_config
from experiments.directory.trust import check_objects
from experiments.errors import Diverged, UsageError, exit_with_usage_error

# A measurement of the machine, which differs between any two runs.
UNCOMPARED = "throughput"


class Difference(NamedTuple):
    """The first number in which two runs differ; None for a missing one."""

    step: int
    tag: str
    before: float | None
    after: float | None

    def __str__(self) -> str:
        if self.before is None or self.after is None:
            return f"step {self.step}, {self.tag}: {self.before} before, {self.after} now"
        distance = abs(self.before - self.after)
        return (
            f"step {self.step}, {self.tag}: {self.before!r} before, {self.after!r} now, "
            f"apart by {distance:.3g} ({distance / max(abs(self.before), 1e-300):.3g} relative)"
        )


def main() -> None:
    """Parse the command line, reproduce, and exit with 0 if the runs are equal, else with 1."""
    stdio.protect()
    parser = argparse.ArgumentParser("python -m experiments.reproduce", description=__doc__)
    parser.add_argument("run", type=Path, help="the directory of a run")
    parser.add_argument("--epochs", type=int, help="number of epochs to reproduce")
    parser.add_argument("--rtol", type=float, default=0.0, help="relative tolerance")
    parser.add_argument("--into", type=Path, help="directory of the new run")
    parser.add_argument("--trust", action="append", default=[], metavar="MODULE",
                        help="a module that the saved config may use")  # fmt: skip
    parser.error = partial(exit_with_usage_error, "experiments.reproduce")  # type: ignore[method-assign]
    args = parser.parse_args()
    try:
        if args.epochs is not None and args.epochs < 1:
            raise UsageError(f"--epochs {args.epochs}: expected at least 1")
        if not 0 <= args.rtol < math.inf:
            raise UsageError(f"--rtol {args.rtol}: expected a number at least 0")
        same = reproduce(args.run, args.into, args.epochs, args.rtol, args.trust)
    except UsageError as error:
        exit_with_usage_error("experiments.reproduce", str(error))
    except BrokenPipeError:  # after the training, which it interrupts
        sys.exit(128 + signal.SIGPIPE)
    sys.exit(0 if same else 1)


def reproduce(
    original: Path, into: Path | None, epochs: int | None, rtol: float, trust: list[str]
) -> bool:
    """Repeat a run in a new directory and print a comparison; returns whether they are equal.

    rtol: relative tolerance; 0 requires identical bits.
    Raises UsageError if the directory holds no run, or one that must not be built.
    """
    config = read_config(original, trust)
    record = read_record(original)
    lines = read_metrics(original)
    environment = record.get("environment", {})
    if environment:
        config["trainer"]["device"] = "cpu" if environment["device"] == "cpu" else "cuda"
    if epochs is not None and epochs > config["trainer"]["epochs"]:
        raise UsageError(f"--epochs {epochs}: the run has {config['trainer']['epochs']}")

    check_objects(config, trust)
    check_source(config)
    stamp = datetime.now().strftime("%Y-%m-%d/%H-%M-%S-reproduction")
    path = claim(into or Path("outputs") / stamp, exact=into is not None)
    reproduction = start(path, config, record["overrides"])
    try:
        job.execute(reproduction, config, epochs=epochs)
    except Diverged as error:
        print(f"diverged: {error}")

    complete = record["state"] == "finished"
    difference = first_difference(lines, read_metrics(path), epochs, rtol, complete=complete)
    weights = weights_difference(original, path, record, reproduction.record, epochs, rtol)
    same = difference is None and weights is None
    print(f"\noriginal      {display_path(original)} ({record['state']})")
    print(f"reproduction  {display_path(path)}")
    for text in (difference, weights):
        if text is not None:
            print(f"differs at    {text}")
    compared = [line for line in lines if is_compared(line, epochs)]
    steps = compared[-1]["step"] if compared else 0
    for note in notes(original, record, reproduction.record):
        print(f"note          {note}")
    if not compared:
        print("nothing to compare: the original logged no numbers")
        return False
    if same:
        verdict = "identical" if rtol == 0 else f"equal within {rtol:g}"
        scope = "and weights " if weights_compared(record, epochs) else ""
        print(f"{verdict}: all {len(compared)} lines of numbers {scope}up to step {steps}")
    return same


def is_compared(line: dict[str, float], epochs: int | None) -> bool:
    """Whether a line of metrics.jsonl is compared: in the first epochs, and not a measurement."""
    if UNCOMPARED in line:
        return False
    return epochs is None or (line["epoch"] <= epochs and "loss/test" not in line)


def first_difference(
    before: list[dict[str, float]],
    after: list[dict[str, float]],
    epochs: int | None,
    rtol: float,
    *,
    complete: bool,
) -> Difference | None:
    """The first number that differs or that only one of the two runs has.

    complete: compare to the end; an unfinished original is compared only as far as it went.
    """
    before = [line for line in before if is_compared(line, epochs)]
    after = [line for line in after if is_compared(line, epochs)]
    for number in range(len(after) if complete and len(after) > len(before) else len(before)):
        line = before[number] if number < len(before) else {"step": after[number]["step"]}
        other = after[number] if number < len(after) else {}
        for tag, value in line.items():
            if tag not in other:
                return Difference(int(line["step"]), tag, value, None)
            if not equal(value, other[tag], rtol):
                return Difference(int(line["step"]), tag, value, other[tag])
        for tag in other.keys() - line.keys():
            return Difference(int(line["step"]), tag, None, other[tag])
    return None


def equal(before: float, after: float, rtol: float) -> bool:
    """Whether two numbers are equal, both NaN, or within `rtol` times the larger."""
    if before == after or (math.isnan(before) and math.isnan(after)):
        return True
    return rtol > 0 and math.isclose(before, after, rel_tol=rtol)


def weights_compared(record: dict[str, Any], epochs: int | None) -> bool:
    """Whether the original has final weights that correspond to these epochs."""
    return epochs is None and "final" in record.get("weights", {})


def weights_difference(
    original: Path,
    path: Path,
    before: dict[str, Any],
    after: dict[str, Any],
    epochs: int | None,
    rtol: float,
) -> str | None:
    """A message on how the final weights differ; None if they are equal or not compared."""
    if not weights_compared(before, epochs):
        return None
    if before["weights"]["final"] == after.get("weights", {}).get("final"):
        return None
    from experiments.directory.checkpoints import Checkpoints

    contents = [Checkpoints(directory / "checkpoints").load() for directory in (original, path)]
    if contents[0] is None or contents[1] is None:
        return "the final weights"
    worst, name = 0.0, ""
    for key, weight in contents[0]["model"].items():
        distance = (weight - contents[1]["model"][key]).abs()
        relative = float((distance / weight.abs().clamp_min(1e-30)).max())
        # relative differences are meaningless near zero: scale by the layer's largest weight there
        if rtol and bool((distance <= rtol * weight.abs().max()).all()):
            continue
        if relative > worst:
            worst, name = relative, key
    if name:
        return f"the final weights: {name} by up to {worst:.3g} relative"
    return None if rtol else "the final weights: run.json and the checkpoint do not match"


def notes(original: Path, before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Differences in the environments of the two runs, and later changes to the original."""
    messages = []
    if sha256((original / "config.yaml").read_bytes()).hexdigest() != before["config_sha256"]:
        messages.append("config.yaml was changed since the run began")
    messages += code_changes(before, identify(after["config"], before)["code"])
    was, now = environment_of(before), environment_of(after)
    messages += [
        f"{name}: {was.get(name)} before, {now[name]} now"
        for name in now
        if was.get(name) != now[name] and (name in was or not name.startswith("git "))
    ]
    if "final" in before.get("weights", {}):
        from experiments.directory.checkpoints import Checkpoints
        from experiments.directory.fingerprint import fingerprint

        content = Checkpoints(original / "checkpoints").load()
        if content is None or fingerprint(content["model"]) != before["weights"]["final"]:
            messages.append("checkpoints: the last one does not hold the run's final weights")
    return messages


def environment_of(record: dict[str, Any]) -> dict[str, Any]:
    """What a run's results may depend on besides its config, from its run.json."""
    git = record["git"]
    known = {}  # what git could not tell is no difference
    if git.get("commit"):
        known["git commit"] = git["commit"]
        if git.get("diff") or git.get("dirty") is False:
            known["git diff"] = git.get("diff")
    return {
        "seed": record["seed"],
        "python": record["python"],
        "platform": record["platform"],
        **record.get("versions", {}),
        **record["packages"],
        **record.get("environment", {}),
        **known,
        **record.get("init", {}),
        **{f"data {split}": digest for split, digest in record.get("data", {}).items()},
        "initial weights": record.get("weights", {}).get("initial"),
    }


if __name__ == "__main__":
    main()
