"""Wall clock of 16 runs of ten epochs at batch 64 (lr by seed), compiled against eager, in turn.

    python benchmarks/compiled_sweep.py [rounds]

Start-up is in both; what is compiled lies in the cache before, but for the first round, which does
not count. Prints the medians, and that first time.
"""

import json
import statistics
import sys
import tempfile

from sweep import wall

COMMAND = [
    *(sys.executable, "-m", "experiments", "-m"),
    *("optimizer.lr=0.01,0.03,0.1,0.3", "seed=0,1,2,3", "scheduler=constant"),
]


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    with tempfile.TemporaryDirectory() as folder:
        cache = {"XDG_CACHE_HOME": folder, "TORCHINDUCTOR_CACHE_DIR": folder}
        first = wall([*COMMAND, "trainer.compile=true"], cache)
        eager, compiled = [], []
        for _ in range(rounds):
            eager.append(wall(COMMAND, {}))
            compiled.append(wall([*COMMAND, "trainer.compile=true"], cache))
    ratios = [one / other for one, other in zip(compiled, eager, strict=True)]
    print(json.dumps({
        "compiled to eager": round(statistics.median(ratios), 3),
        "eager s": round(statistics.median(eager), 1),
        "compiled s": round(statistics.median(compiled), 1),
        "compiled s, with compiling": round(first, 1),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
