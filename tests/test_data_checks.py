"""What is looked at before the first step: rows, targets, state outside checkpoints."""

import json
import math
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from objectives import READ, evaluated
from saved_runs import SMALL, assert_same_run, go_on, kill_after, record
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import Dataset, TensorDataset

from experiments import job
from experiments.data import Data, Split
from experiments.data.checks import check_data
from experiments.data.loaders import TensorLoader, TorchLoader
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.metrics import read_metrics
from experiments.directory.plain_json import dumps
from experiments.directory.record import read_record
from experiments.errors import UsageError
from experiments.training.checks import (
    check_last_batch,
    check_state,
    check_values,
    mismatch_remedy,
    report_mean,
)
from experiments.training.first_batch import check_batches
from experiments.training.means import step_weights
from experiments.training.objective import Objective
from experiments.training.parts import FunctionLoss
from experiments.training.probe import probe
from experiments.training.schedules import constant
from experiments.training.steps import EagerSteps

CONFIG = {"model": {"_target_": "mine.Model"}, "loss": {"_target_": "mine.Loss"}}
Compose = Callable[[list[str]], dict[str, Any]]


def split(rows: int, **options: Any) -> Split:
    x = torch.randn(rows, 4, generator=torch.Generator().manual_seed(rows))
    return Split(x, torch.arange(rows) % 3, **options)


def data(**splits: Any) -> Data:
    return Data(**({"train": split(40), "valid": split(20), "test": split(12)} | splits))


def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(4, 3)


class Noisy(Dataset[tuple[Tensor, Tensor]]):
    """Rows with noise from all three global generators."""

    def __init__(self, rows: Split) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        noise = torch.rand(()) + random.random() + np.random.rand()
        return self.rows.x[row] + noise, self.rows.y[row]


# the data set


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"train": data()}, r"returned a dict; return experiments.data.Data"),
        (data(valid=Split(torch.ones(4, 4), torch.zeros(3))), "valid has 4 rows of x and 3 of y"),
        (data(test=split(0)), "test has no rows"),
        (data(train=Split(np.ones((3, 4)), torch.zeros(3))), "torch.from_numpy"),
        (data(test=iter([])), "test is a list_iterator, .* loader=torch"),
        (data(valid=["a", "b"]), r"valid\[0\] is a str without a tensor, an array or a number"),
    ],
)
def test_what_is_no_data_set_is_refused_in_one_line(wrong: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words) as error:
        check_data(wrong, "mine.load")
    assert str(error.value).startswith("data._target_=mine.load: ")


def test_small_bytes_that_may_be_codes_are_refused_until_the_split_says_what_they_are() -> None:
    codes = Split(torch.arange(20, dtype=torch.uint8).view(20, 1), torch.zeros(20).long())
    with pytest.raises(UsageError, match=r"bytes up to 19.*pixels=False"):
        check_data(data(train=codes), "mine.load")
    said = replace(codes, pixels=False)
    check_data(data(train=said), "mine.load")
    for kind in (TensorLoader, TorchLoader):
        [(xb, _)] = kind(said, batch_size=20).batches()
        assert torch.equal(xb, codes.x)


def test_a_dataset_with_a_generator_of_its_own_is_refused() -> None:
    class Own(Noisy):
        generator = torch.Generator()

        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            return self.rows.x[row] + torch.rand((), generator=self.generator), self.rows.y[row]

    with pytest.raises(UsageError, match=r"row \d differs when it is read again"):
        check_data(data(train=Own(split(40))), "mine.load")
    check_data(data(train=Noisy(split(40))), "mine.load")


class Ragged(Noisy):
    """One row is shorter than the others."""

    def __init__(self, rows: Split, short: int) -> None:
        super().__init__(rows)
        self.short = short

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        return self.rows.x[row, : 3 if row == self.short else 4], self.rows.y[row]


def test_rows_of_different_shapes_are_refused_among_the_first_and_among_all() -> None:
    config = {"loader": {"batch_size": 4}}
    for row in (2, 39):
        found = data(train=Ragged(split(40), row))
        with pytest.raises(UsageError, match=rf"x of row {row} has the shape \(3,\)"):
            check_batches(config, found, TorchLoader(found.train, batch_size=4))
        check_batches(config, found, TorchLoader(found.train, batch_size=4, collate_fn=list))


class Rare(Noisy):
    """Draws from a generator of its own for the last row alone."""

    def __init__(self, rows: Split, seeded: bool) -> None:
        super().__init__(rows)
        self.parts, self.seeded = [random.Random(0)], seeded

    def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
        x, y = self.rows.x[row], self.rows.y[row]
        if self.seeded:
            self.parts[0].seed(row)
        return (x + self.parts[0].random() if row == len(self) - 1 else x), y


def test_a_generator_that_few_rows_draw_from_is_found_when_all_are_read() -> None:
    with pytest.raises(UsageError, match="row 39 of a Dataset draws from a generator of its own"):
        _ = data(train=Rare(split(40), seeded=False)).scans


def test_a_generator_that_is_seeded_by_the_row_is_fine() -> None:
    assert data(train=Rare(split(40), seeded=True)).scans["train"].fingerprint


def test_rows_that_were_written_to_are_loaded_again(compose: Compose) -> None:
    config = compose([])
    rows = job.load_data(config).valid.x
    assert job.load_data(config).valid.x is rows
    rows[0].add_(1)
    assert job.load_data(config).valid.x is not rows


# datasets through loader=torch


def test_neither_workers_nor_the_first_batch_change_what_a_sample_draws() -> None:
    rows = Noisy(split(40))
    options: dict[str, Any] = {"batch_size": 8, "shuffle": True, "seed": 3}
    alone = list(TorchLoader(rows, **options).batches(1))
    workers = list(TorchLoader(rows, num_workers=2, **options).batches(1))
    resumed = list(TorchLoader(rows, **options).batches(1, start=2))
    for one, other in [*zip(alone, workers, strict=True), *zip(alone[2:], resumed, strict=True)]:
        assert torch.equal(one[0], other[0])
    other_epoch = list(TorchLoader(rows, **options | {"shuffle": False}).batches(2))
    same_rows = list(TorchLoader(rows, **options | {"shuffle": False}).batches(1))
    assert not torch.equal(other_epoch[0][0], same_rows[0][0])


def test_a_split_with_a_getitem_of_its_own_is_read_through_it() -> None:
    class Doubled(Split):
        def __getitem__(self, row: int) -> tuple[Tensor, Tensor]:
            return 2 * self.x[row], self.y[row]

    rows = split(8)
    [(xb, _)] = TorchLoader(Doubled(rows.x, rows.y), batch_size=8).batches()
    assert torch.equal(xb, 2 * rows.x)
    with pytest.raises(UsageError, match=r"^loader=tensors: .*Doubled.*use loader=torch$"):
        TensorLoader(Doubled(rows.x, rows.y), batch_size=8)


def test_a_dataset_with_random_transforms_is_resumed_with_the_same_bits(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "loader=torch", "checkpoint.every_steps=2", "loader.num_workers=2",
                      "loader.batch_size=72"])  # fmt: skip
    rows = Data(Noisy(tiny.train), TensorDataset(tiny.valid.x, tiny.valid.y), tiny.test)  # type: ignore[arg-type]
    go_on(tmp_path / "whole", config, rows)
    go_on(tmp_path / "killed", config, rows, kill_after(8))
    go_on(tmp_path / "killed", config, rows)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


def test_the_fingerprint_of_a_dataset_is_its_own_or_that_of_all_its_rows() -> None:
    class Named(Noisy):
        fingerprint = "version 2"

    one, other = split(20), split(20)
    other.x[19] += 1
    found = data(train=Noisy(one), valid=Noisy(other), test=Named(one)).fingerprints
    assert found["train"] != found["valid"]
    assert found["test"] == "version 2"
    assert data(train=Noisy(one)).fingerprints["train"] == found["train"]


# values


@pytest.mark.parametrize("name", ["train", "valid", "test"])
@pytest.mark.parametrize("target", [-1, 3])
@pytest.mark.parametrize("kind", [lambda s: s, lambda s: TensorDataset(s.x, s.y)])
def test_a_target_that_no_output_stands_for_is_refused_in_every_split(
    name: str, target: int, kind: Callable[[Split], Any]
) -> None:
    rows = split(20)
    rows.y[7], rows.y[9] = target, -100
    with pytest.raises(UsageError, match=rf"row 7 of {name} has the target {target}"):
        check_values(
            CONFIG, Objective(linear(), nn.CrossEntropyLoss()), data(**{name: kind(rows)}), READ
        )
    rows.y[7] = -100
    check_values(
        CONFIG, Objective(linear(), nn.CrossEntropyLoss()), data(**{name: kind(rows)}), READ
    )


def labelled(*targets: int) -> Split:
    """Rows with these targets."""
    return Split(torch.zeros(len(targets), 4), torch.tensor(targets))


def checked(found: Data, loss_func: nn.Module | None = None, outputs: int = 10) -> None:
    """Check the targets of a linear model's data."""
    objective = Objective(nn.Linear(4, outputs), loss_func or nn.CrossEntropyLoss())
    check_values(CONFIG, objective, found, READ)


@pytest.mark.parametrize("name", ["valid", "test"])
@pytest.mark.parametrize("kind", ["tensors", "samples"])
@pytest.mark.parametrize("loss_func", [
    nn.CrossEntropyLoss(), FunctionLoss(partial(functional.cross_entropy, label_smoothing=0.1)),
])  # fmt: skip
def test_a_class_that_no_training_row_has_is_refused(
    loss_func: nn.Module, kind: str, name: str
) -> None:
    splits: dict[str, Any] = {
        "train": labelled(0, 1, 3, 0), "valid": labelled(0, 1), "test": labelled(3, 1),
        name: labelled(0, 2, 2, 1),
    }  # fmt: skip
    if kind == "samples":
        splits = {key: TensorDataset(part.x, part.y) for key, part in splits.items()}
    words = f"^data: row 1 of {name} has the class 2, which no training row has"
    with pytest.raises(UsageError, match=words) as refused:
        checked(Data(**splits), loss_func)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("found", "loss_func"),
    [
        (Data(labelled(0, 1), labelled(0, 1), labelled(1)), nn.CrossEntropyLoss()),
        (Data(labelled(0, 1), labelled(0, -100), labelled(1)), nn.CrossEntropyLoss()),
        (Data(labelled(0, 1), labelled(0, 9), labelled(1)), nn.CrossEntropyLoss(ignore_index=9)),
        (Data(labelled(0, 1), labelled(0, 9), labelled(1)),
         FunctionLoss(partial(functional.cross_entropy, ignore_index=9))),
        (Data(labelled(0, 1), labelled(0, 9), labelled(1)), FunctionLoss(lambda a, b: a.sum())),
    ],
    ids=["no row of it", "ignored", "ignored by number", "ignored by a function",
         "a loss of one's own"],
)  # fmt: skip
def test_a_class_without_training_rows_is_fine_where_nothing_is_to_be_learnt(
    found: Data, loss_func: nn.Module
) -> None:
    checked(found, loss_func)


def test_words_of_a_text_need_not_be_in_its_training_part() -> None:
    splits = (Split(torch.zeros(1, 10, 4), torch.tensor([[0, 1, word]])) for word in (2, 3, 4))
    checked(Data(*splits), outputs=3)


def test_more_classes_than_are_told_apart_are_rather_words() -> None:
    train, valid = labelled(*range(1500)), labelled(1500)
    checked(Data(train, valid, valid), outputs=1501)


def test_integers_that_are_numbers_are_no_classes() -> None:
    splits = (Split(torch.zeros(2, 4), torch.tensor(y)) for y in ([1, 2], [3, 4], [70_000, 5]))
    checked(Data(*splits), nn.MSELoss(), outputs=2)


@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_refused_and_in_the_test_rows_told(
    number: float, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = split(12)
    rows.x[5, 2] = number
    for name in ("train", "valid"):
        with pytest.raises(UsageError, match=f"row 5 of {name} x is NaN or infinite"):
            check_values(
                CONFIG, Objective(linear(), nn.CrossEntropyLoss()), data(**{name: rows}), READ
            )
    check_values(CONFIG, Objective(linear(), nn.CrossEntropyLoss()), data(test=rows), READ)
    assert "row 5 of test x is NaN or infinite" in capsys.readouterr().err


def test_a_model_that_copes_with_nan_may_train_on_it() -> None:
    class Filled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.nan_to_num())

    rows = split(40)
    rows.x[5, 2] = math.nan
    check_values(CONFIG, Objective(Filled(4, 3), nn.CrossEntropyLoss()), data(train=rows), READ)


def test_finite_numbers_whose_sum_overflows_are_finite() -> None:
    rows = Split(torch.full((10, 4), 3e38), torch.zeros(10).long())
    assert data(train=rows).scans["train"].not_finite == {}


# rows are not written to


class Standardized(nn.Linear):
    """Writes to its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))


def test_a_model_that_writes_to_its_input_gets_copies(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    before = tiny.valid.x.clone()
    assert check_state(CONFIG, Objective(Standardized(4, 3), nn.CrossEntropyLoss()), split(9), READ)
    assert not check_state(CONFIG, Objective(linear(), nn.CrossEntropyLoss()), split(9), READ)
    config = compose(SMALL)
    config["model"] = {"_target_": f"{__name__}.Standardized", "in_features": 784,
                       "out_features": 10}  # fmt: skip
    go_on(tmp_path / "run", config, tiny)
    assert torch.equal(tiny.valid.x, before)


class Capped(nn.CrossEntropyLoss):
    """Writes to the targets, and leaves those of the first rows as they are."""

    def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().forward(outputs, targets.clamp_(max=1))


def test_a_write_that_leaves_the_first_rows_as_they_are_is_found() -> None:
    assert check_state(CONFIG, Objective(linear(), Capped()), split(9), READ)


@pytest.mark.parametrize("shared", [Tensor.numpy, lambda x: x.data])
def test_a_write_that_no_version_counts_is_found(shared: Callable[[Tensor], Any]) -> None:
    class Through(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            values = shared(x)
            values *= 2
            return super().forward(x)

    assert check_state(CONFIG, Objective(Through(4, 3), nn.CrossEntropyLoss()), split(9), READ)


def test_a_write_to_a_view_is_noticed_after_its_batch() -> None:
    batches = TensorLoader(split(8), batch_size=4).batches()
    next(batches)[0].add_(1)
    with pytest.raises(UsageError, match="wrote to the rows"):
        next(batches)


# state


class Counting(nn.Linear):
    """Counts its training steps in Python."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return super().forward(x)


class CountingInExtraState(Counting):
    def get_extra_state(self) -> int:
        return self.calls

    def set_extra_state(self, state: int) -> None:
        self.calls = state


class Remembering(nn.Linear):
    """Keeps its last output and a flag, on which nothing depends."""

    seen = False

    def forward(self, x: Tensor) -> Tensor:
        self.seen, self.last = True, super().forward(x)
        return self.last


class FirstBatch(nn.Linear):
    """Initializes its weights from the first batch, and notes it in Python."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            with torch.no_grad():
                self.weight.add_(x.mean())
            self.ready = True
        return super().forward(x)


def test_a_count_in_an_attribute_is_refused_by_its_name() -> None:
    words = r"model\._target_=mine.Model: model.1.calls changes in training.*register_buffer"
    with pytest.raises(UsageError, match=words):
        check_state(
            CONFIG,
            Objective(nn.Sequential(nn.Identity(), Counting(4, 3)), nn.CrossEntropyLoss()),
            split(9),
            READ,
        )


def test_an_initialization_by_the_first_batch_that_would_happen_again_is_refused() -> None:
    with pytest.raises(UsageError, match=r"model\.ready changes in training"):
        check_state(CONFIG, Objective(FirstBatch(4, 3), nn.CrossEntropyLoss()), split(9), READ)


@pytest.mark.parametrize("kind", [CountingInExtraState, Remembering])
def test_state_in_a_checkpoint_and_state_that_changes_nothing_are_accepted(
    kind: type[nn.Linear],
) -> None:
    model = kind(4, 3)
    check_state(CONFIG, Objective(model, nn.CrossEntropyLoss()), split(9), READ)
    assert not getattr(model, "calls", 0)
    assert not hasattr(model, "last")


class Hooked(nn.Linear):
    """Registers a hook with the first training step."""

    ready = False

    def forward(self, x: Tensor) -> Tensor:
        if self.training and not self.ready:
            self.register_forward_hook(lambda module, args, output: output * 2)
            self.ready = True
        return super().forward(x)


def test_a_hook_that_the_first_training_step_registers_is_there_once() -> None:
    model = Hooked(4, 3)
    probe(Objective(model, nn.CrossEntropyLoss()), (split(9).x, split(9).y))
    model.train()(split(9).x)
    assert len(model._forward_hooks) == 1


def test_a_loss_without_a_gradient_is_refused() -> None:
    class Detached(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().forward(outputs.detach(), targets)

    config = {**CONFIG, "loader": {"batch_size": 4}}
    with pytest.raises(UsageError, match=r"^loss._target_=mine.Loss: has no gradient"):
        check_state(config, Objective(linear(), Detached()), split(9), READ)


def test_a_loss_whose_gradient_does_not_reach_the_model_is_told(
    capsys: pytest.CaptureFixture[str],
) -> None:
    class Constant(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return torch.zeros((), requires_grad=True)

    check_state(
        {**CONFIG, "loader": {"batch_size": 4}}, Objective(linear(), Constant()), split(9), READ
    )
    assert "warning: loss._target_=mine.Loss: does not depend" in capsys.readouterr().err


def test_a_loss_of_pairs_that_finds_none_in_two_rows_is_fine() -> None:
    class OfSome(nn.CrossEntropyLoss):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return (
                super().forward(outputs[2:], targets[2:]) if len(targets) > 2 else torch.zeros(())
            )

    check_state(
        {**CONFIG, "loader": {"batch_size": 4}}, Objective(linear(), OfSome()), split(9), READ
    )


def test_a_probe_leaves_weights_buffers_and_generators_as_they_were() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(), nn.Linear(8, 3)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    generators = torch.get_rng_state(), random.getstate()
    found = probe(Objective(model, nn.CrossEntropyLoss()), (split(9).x, split(9).y))
    assert found is not None
    assert found.repeatable
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), generators[0])
    assert random.getstate() == generators[1]
    assert not any(module.training for module in model.modules())


def test_a_last_batch_of_one_row_is_refused_for_batch_norm() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    rows = split(9)
    for size, refused in ((4, True), (3, False)):
        loader = TensorLoader(rows, batch_size=size)
        objective = Objective(model, nn.CrossEntropyLoss())
        arguments = (CONFIG, objective, rows, loader, READ)
        if refused:
            with pytest.raises(UsageError, match=r"^loader.batch_size=4.*loader.drop_last=true"):
                check_last_batch(*arguments)
        else:
            check_last_batch(*arguments)


class Learned(nn.Module):
    """A loss with a parameter, and a buffer that follows the training loss."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.log_variance = nn.Parameter(torch.zeros(()))
        self.register_buffer("mean", torch.ones(()))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        loss = nn.functional.cross_entropy(logits, targets)
        if self.training:
            self.mean.mul_(0.9).add_(0.1 * loss.detach())
        return loss / self.mean * torch.exp(-self.log_variance) + self.log_variance


def test_a_losss_parameters_are_trained_and_its_state_is_resumed_with_the_same_bits(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "checkpoint.every_steps=1"])
    config["loss"] = {"_target_": f"{__name__}.Learned"}
    go_on(tmp_path / "whole", config, tiny)
    go_on(tmp_path / "killed", config, tiny, kill_after(7))
    go_on(tmp_path / "killed", config, tiny)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")
    content = Checkpoints(tmp_path / "whole" / "checkpoints").load()
    assert content is not None
    assert content["loss"]["log_variance"] != 0
    assert content["loss"]["mean"] != 1


# means


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 10.0, 0.1])},
                                     {"ignore_index": 0}])  # fmt: skip
@pytest.mark.parametrize("batch_size", [1, 3, 5, 20])
def test_a_mean_over_batches_is_that_of_the_whole_split(
    options: dict[str, Any], batch_size: int
) -> None:
    loss_func, rows, model = nn.CrossEntropyLoss(**options), split(20), linear()
    expected = loss_func(model(rows.x), rows.y).item()
    for kind in (TensorLoader, TorchLoader):
        found, _ = evaluated(model, loss_func, kind(rows, batch_size=batch_size))
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("options", [{"weight": torch.tensor([1.0, 10.0, 0.1])},
                                     {"ignore_index": 0}])  # fmt: skip
def test_accumulated_batches_make_the_step_of_one_by_the_weights_of_their_targets(
    options: dict[str, Any],
) -> None:
    loss_func, rows, results = nn.CrossEntropyLoss(**options), split(20), []
    weigh = step_weights(Objective(linear(), loss_func), data(train=rows).scans["train"])
    for batch_size, accumulated in ((20, 1), (1, 20)):
        model = linear()
        opt = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = TensorLoader(rows, batch_size=batch_size)
        steps = EagerSteps(
            Objective(model, loss_func), opt, constant(opt), loader, accumulated, weigh
        )
        [result] = steps.take(0, 0)
        results.append([result.losses, *model.state_dict().values()])
    for one, other in zip(*results, strict=True):
        assert torch.allclose(one, other, rtol=1e-5)


def test_a_run_with_a_batch_of_ignored_targets_goes_on(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    y = tiny.train.y.clone()
    y[:144] = -100
    config = compose([*SMALL, "trainer.log_every=1", "loader.shuffle=false"])
    go_on(tmp_path / "run", config, replace(tiny, train=Split(tiny.train.x, y)))
    logged = [line for line in read_metrics(tmp_path / "run") if "lr" in line]
    assert ["loss/train" in line for line in logged[:3]] == [False, False, True]
    assert all(math.isfinite(line.get("loss/train", 0)) for line in logged)


def test_a_loss_that_is_no_mean_over_rows_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    report_mean(CONFIG, Objective(linear(), nn.CrossEntropyLoss(reduction="sum")), split(20), READ)
    assert "count each batch by its rows" in capsys.readouterr().err
    report_mean(CONFIG, Objective(linear(), nn.MultiMarginLoss()), split(20), READ)
    assert capsys.readouterr().err == ""


# what is not finite, in files


@pytest.mark.parametrize("first", [100, 299])
def test_a_loss_that_ignores_targets_far_from_the_first_rows_is_told(
    first: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Ignoring(nn.Module):
        def forward(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(outputs, targets)

    rows = split(300)
    rows.y[first:] = -100
    report_mean(CONFIG, Objective(linear(), Ignoring()), rows, READ)
    assert "not the mean of its rows' losses" in capsys.readouterr().err


def test_nan_is_null_and_infinity_a_number_in_valid_json() -> None:
    def refuse(constant: str) -> float:
        raise ValueError(constant)

    text = dumps({"a": math.nan, "b": [math.inf, -math.inf], "c": "Infinity"})
    found = json.loads(text, parse_constant=refuse)
    assert found == {"a": None, "b": [math.inf, -math.inf], "c": "Infinity"}


def test_a_run_whose_test_rows_hold_nan_leaves_valid_json(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    x = tiny.test.x.clone()
    x[3] = math.nan
    go_on(tmp_path / "run", compose(SMALL), replace(tiny, test=Split(x, tiny.test.y)))
    assert record(tmp_path / "run")["metrics"]["test"]["loss/test"] is None
    assert math.isnan(read_record(tmp_path / "run")["metrics"]["test"]["loss/test"])
    assert math.isnan(read_metrics(tmp_path / "run")[-1]["loss/test"])


# names


def test_checkpoints_of_six_digit_epochs_and_ten_digit_steps_are_kept_and_found(
    tmp_path: Path,
) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", keep=2)
    for epoch, step in ((99_999, 999_999_999), (100_000, 10**9), (100_001, 10**9 + 1)):
        checkpoints.save(step, epoch, {"model": {"w": torch.zeros(1)}})
    assert [entry.epochs for entry in checkpoints.entries()] == [100_000, 100_001]


def test_a_class_below_zero_is_told_to_be_corrected_or_ignored() -> None:
    y = torch.tensor([0, -1, 1])
    remedy = mismatch_remedy(nn.CrossEntropyLoss(), torch.zeros(3, 4), y, torch.zeros(3, 2))
    assert remedy.startswith("y holds the class -1: correct it")
