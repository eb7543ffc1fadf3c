"""The figures of scikit-learn's HistGradientBoosting on the diamonds of the recipes `regression` and
`table`, on the same rows: `python benchmarks/tables.py` (with the extra `bench`).
"""

import numpy as np
from sklearn.ensemble import HistGradientBoostingClassifier, HistGradientBoostingRegressor
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, r2_score

from experiments.data import Split
from experiments.recipes import diamonds


def columns(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """The inputs as one matrix, float64 (rows, numbers + categories), and the targets."""
    inputs = [split.x["numbers"].numpy(), split.x["categories"].numpy()]
    return np.concatenate(inputs, 1).astype(np.float64), split.y.numpy().squeeze()


def main() -> None:
    """Fit both and print the figures of their test rows."""
    for target in ("price", "cut"):
        data = diamonds.load(target)
        (x, y), (test_x, test_y) = columns(data.train), columns(data.test)
        categories = list(range(data.sizes["numbers"], x.shape[1]))
        options = {"categorical_features": categories, "random_state": 0}
        if target == "cut":
            for rounds in (100, 500):
                model = HistGradientBoostingClassifier(max_iter=rounds, **options).fit(x, y)
                found = model.predict(test_x)
                print(f"cut, {rounds} rounds: macro-F1 {f1_score(test_y, found, average='macro'):.4f}"
                      f", accuracy {accuracy_score(test_y, found):.4f}")  # fmt: skip
            continue
        for loss in ("squared_error", "absolute_error"):
            for rounds in (100, 500):
                model = HistGradientBoostingRegressor(loss=loss, max_iter=rounds, **options)
                found = model.fit(x, y).predict(test_x)
                print(f"price, {loss}, {rounds} rounds: mean absolute error "
                      f"{mean_absolute_error(test_y, found):.1f}, "
                      f"R2 {r2_score(test_y, found):.4f}")  # fmt: skip


if __name__ == "__main__":
    main()
