"""The figures of scikit-learn's HistGradientBoosting for the recipes `regression` and `table`, on
the same rows: `python benchmarks/tables.py` (with the extra `bench`).
"""

from typing import Any

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
    for rounds in (100, 500):
        x, y, test_x, test_y, options = rows("price")
        for loss in ("squared_error", "absolute_error"):
            regressor = HistGradientBoostingRegressor(loss=loss, max_iter=rounds, **options)
            found = regressor.fit(x, y).predict(test_x)
            error, r2 = mean_absolute_error(test_y, found), r2_score(test_y, found)
            print(f"price, {loss}, {rounds} rounds: mae {error:.1f}, R2 {r2:.4f}")
        x, y, test_x, test_y, options = rows("cut")
        found = HistGradientBoostingClassifier(max_iter=rounds, **options).fit(x, y).predict(test_x)
        f1, accuracy = f1_score(test_y, found, average="macro"), accuracy_score(test_y, found)
        print(f"cut, {rounds} rounds: macro-F1 {f1:.4f}, accuracy {accuracy:.4f}")


def rows(target: str) -> tuple[Any, ...]:
    """The inputs and targets to train on and of the test, and the options of both models."""
    data = diamonds.load(target)
    train, test = columns(data.train), columns(data.test)
    numbers = data.sizes["numbers"]
    categories = list(range(numbers, train[0].shape[1]))
    return *train, *test, {"categorical_features": categories, "random_state": 0}


if __name__ == "__main__":
    main()
