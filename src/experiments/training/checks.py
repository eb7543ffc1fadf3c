"""Checks that data, model and loss fit together, before the first step."""

import sys
from typing import Any, cast

import torch
from torch import Tensor, nn

from experiments.data import Data, Split, reads_samples
from experiments.data.loaders import Batch, BatchRows, select
from experiments.data.nests import is_tensor, map_tensors
from experiments.data.partition import MAX_CLASSES
from experiments.data.scan import Scan
from experiments.directory.checkpoints import serialize
from experiments.errors import UsageError
from experiments.training.accuracy import function_of, is_of_classes
from experiments.training.means import is_mean_over_rows, target_weights
from experiments.training.objective import Objective, StepOutput
from experiments.training.probe import probe

# Rows beside one with a NaN, to find whether a model or a loss can do with it.
NEIGHBOURS = 4
# Rows of which the loss is compared with that of its parts.
COMPARED_ROWS = 64


class Reader:
    """Reads batches of some rows of a split, as the training loader collates them, on a device."""

    def __init__(self, loader: Any, device: str) -> None:
        self.collate, self.device = getattr(loader, "collate", None), device

    def __call__(self, split: Any, rows: list[int]) -> Batch:
        """The batch of some rows, which shares no memory with the split: rows of a memory-mapped
        file must not be written to by an in-place layer.
        """
        batch = select(split, rows, self.collate)
        return map_tensors(lambda tensor: tensor.to(self.device), batch)


def check_values(config: dict[str, Any], objective: Objective, data: Data, read: Reader) -> None:
    """Raise UsageError for rows that training, validation or the test would stumble over: targets
    that no output stands for, and numbers that are not finite and make the loss so. In the test
    rows alone these are only told. Reads each split once, while it is fingerprinted.
    """
    for name, split in data.splits.items():
        found = data.scans[name]
        if objective.is_supervised:
            check_targets(objective, name, split, found, read)
            check_seen(objective, name, split, found, data.scans["train"])
        for part, row in found.not_finite.items():
            if copes(objective, split, row, read):
                continue
            line = f"data: row {row} of {name} {part} is NaN or infinite"
            if name != "test":
                raise UsageError(f"{line}, and so would the loss be; fill or drop such rows")
            print(f"warning: {line}, and so will loss/test be", file=sys.stderr)


def check_targets(objective: Objective, name: str, split: Any, found: Scan, read: Reader) -> None:
    """Raise UsageError for a target that is no class of torch's cross entropy, or for a split whose
    targets are all ignored.
    """
    loss_func = objective.loss_func
    of_classes = type(loss_func) in (nn.CrossEntropyLoss, nn.NLLLoss)
    if not of_classes or found.lowest is None or found.highest is None:
        return
    ignored = cast(int, loss_func.ignore_index)
    logits = evaluated(objective, read(split, [0])).outputs
    classes = logits.shape[1 if logits.ndim > 1 else 0]
    if found.lowest < 0 or found.highest >= classes:
        outside = first_outside(split, found, classes, ignored)
        if outside is not None:
            row, target = outside
            raise UsageError(
                f"data: row {row} of {name} has the target {target}, and the model's "
                f"{classes} outputs stand for 0 to {classes - 1}; correct it, change "
                f"model.out_features, or set it to {ignored} (the loss's ignore_index) to ignore it"
            )
    if found.lowest == found.highest == ignored:
        message = f"data: every target of {name} is loss.ignore_index={ignored}"
        if name == "test":
            print(f"warning: {message}, so loss/test is NaN", file=sys.stderr)
        else:
            raise UsageError(f"{message}, so there is no loss; use other rows")


def check_seen(objective: Objective, name: str, split: Any, found: Scan, train: Scan) -> None:
    """Raise UsageError for a class that rows of a split have and no training row has, if a loss of
    classes counts it. More than MAX_CLASSES are rather words, of which a text may have new ones.
    """
    if found.targets is None or train.targets is None or len(train.targets) > MAX_CLASSES:
        return
    if not is_of_classes(function_of(objective.loss_func)):
        return
    function = getattr(objective.loss_func, "function", objective.loss_func)  # with its arguments
    given = getattr(function, "keywords", {}).get("ignore_index", -100)
    unseen = found.targets - train.targets - {getattr(function, "ignore_index", given)}
    if not unseen:
        return
    target = min(unseen)
    row = found.classes.get(target)
    if row is None:
        row = int((split.y == target).nonzero()[0])
    raise UsageError(
        f"data: row {row} of {name} has the class {target}, which no training row has; move some "
        "rows of that class to the training split, or leave them out"
    )


def first_outside(split: Any, found: Scan, classes: int, ignored: int) -> tuple[int, int] | None:
    """The first row with a target below 0 or from `classes` on that is not ignored, and the
    target; None if there is none.
    """
    if reads_samples(split):
        outside = [
            (row, target)
            for target, row in found.classes.items()
            if not 0 <= target < classes and target != ignored
        ]
        return min(outside, default=None)
    y = cast(Split, split).y
    rows = ((y < 0) | (y >= classes)) & (y != ignored)
    first = rows.reshape(len(y), -1).any(1).nonzero()
    if len(first) == 0:
        return None
    row = int(first[0])
    return row, int(y[row][rows[row]].flatten()[0])


def evaluated(objective: Objective, batch: Batch) -> StepOutput:
    """The step's output for a batch, without a gradient and in evaluation mode."""
    with torch.no_grad():
        output: StepOutput = objective.eval()(batch)
        return output


def copes(objective: Objective, split: Any, row: int, read: Reader) -> bool:
    """Whether the loss of a row that is not finite, with some others, is finite nevertheless."""
    rows = [row, *(other for other in range(min(NEIGHBOURS, len(split))) if other != row)]
    return bool(evaluated(objective, read(split, rows)).loss.isfinite().all())


def check_state(config: dict[str, Any], objective: Objective, train: Any, read: Reader) -> bool:
    """Raise UsageError if model, loss or step keep state that no checkpoint holds. Returns whether
    they write to their batch, which then must be a copy.
    """
    check_extra_state(config, {"model": objective.model, "loss": objective.loss_func})
    found = probe(objective, read(train, list(range(min(2, len(train))))))
    if found is None:
        return True  # unknown: copies are always right
    if not found.trains_model:
        check_gradient(config, objective, train, read)
    names = found.evolving or ([] if found.repeatable else found.changed)
    if names:
        name = names[0]
        group = name.partition(".")[0]
        remedy = "keep it in a tensor with register_buffer, or save it with get_extra_state and "
        remedy += "set_extra_state"
        if group == "step" and not isinstance(objective.step, nn.Module):
            remedy = "keep it in attributes that are numbers, texts, tensors or lists of them, or "
            remedy += "give the step a state_dict and a load_state_dict"
        raise UsageError(
            f"{group}._target_={config[group]['_target_']}: {name} changes in training and is in "
            f"no checkpoint, so a resumed run would end with other numbers; {remedy}"
        )
    if not found.repeatable:
        raise UsageError(
            f"model._target_={config['model']['_target_']}: two equal training steps give other "
            "numbers, so the model, the loss, the step or an augmentation draws from a generator, "
            "or reads a clock, that no checkpoint holds; draw from random, np.random or torch"
        )
    return found.writes_input


def check_gradient(config: dict[str, Any], objective: Objective, train: Any, read: Reader) -> None:
    """Raise UsageError if the loss of a training batch has no gradient; say if it has one, but not
    with respect to the model. For a loss of which two rows had none: of pairs, say.
    """
    found = probe(
        objective, read(train, list(range(min(config["loader"]["batch_size"], len(train)))))
    )
    if found is None or found.trains_model:
        return
    group = objective.loss_group
    target = f"{group}._target_={config[group]['_target_']}"
    remedy = "leave out what cuts the loss off from the model: detach, no_grad, item, argmax"
    if not found.has_gradient:
        raise UsageError(f"{target}: has no gradient, so there is nothing to train; {remedy}")
    print(f"warning: {target}: does not depend on the model's weights; {remedy}", file=sys.stderr)


def check_last_batch(
    config: dict[str, Any], objective: Objective, train: Any, loader: Any, read: Reader
) -> None:
    """Raise UsageError if the last batch of an epoch has one row and the model cannot train on one,
    as with BatchNorm, though it can on two.
    """
    rows = getattr(loader, "rows", None)
    if not isinstance(rows, BatchRows) or rows.rows < 2 or len(train) < 2:
        return
    size = rows.batch_size
    last = 0 if rows.drop_last and size > 1 else rows.rows % size
    if last != 1 and size != 1:
        return
    if probe(objective, read(train, [0, 1])) and not probe(objective, read(train, [0])):
        raise UsageError(
            f"loader.batch_size={size}: {rows.rows} rows leave a last batch of one row, "
            "and the model cannot train on one (BatchNorm needs two); use loader.drop_last=true or "
            "another batch size"
        )


def check_extra_state(config: dict[str, Any], parts: dict[str, nn.Module]) -> None:
    """Raise UsageError if a state_dict holds what no checkpoint can."""
    for group, part in parts.items():
        for name, value in part.state_dict().items():
            if isinstance(value, Tensor):
                continue
            try:
                serialize({name: value})
            except TypeError as error:
                raise UsageError(
                    f"{group}._target_={config[group]['_target_']}: {error}; get_extra_state may "
                    "return tensors, numbers, texts, lists and dicts"
                ) from None


def report_mean(config: dict[str, Any], objective: Objective, train: Any, read: Reader) -> None:
    """Say that means over batches are by rows if the loss is no mean over the rows of a batch, and
    the step does not say how much a batch counts.
    """
    if len(train) < 3 or (
        objective.is_supervised and target_weights(objective.loss_func) is not None
    ):
        return
    objective.eval()
    try:
        batches = [read(train, rows) for rows in compared_rows(train)]
        if any(evaluated(objective, batch).weight is not None for batch in batches):
            return
        even = all(is_mean_over_rows(objective, batch) for batch in batches)
    except Exception:  # the loss needs a whole batch, say
        return
    if not even:
        group = objective.loss_group
        print(
            f"warning: {group}._target_={config[group]['_target_']}: the loss of a batch is not "
            "the mean of its rows' losses; means over batches (loss/train, loss/valid, loss/test, "
            "trainer.accumulate) count each batch by its rows",
            file=sys.stderr,
        )


def compared_rows(split: Any) -> list[list[int]]:
    """Batches of rows to compare a loss on: some from all over the split and, in memory, those with
    the lowest and the highest target, which it may ignore, between the first and the last.
    """
    rows = {row * len(split) // COMPARED_ROWS for row in range(COMPARED_ROWS)}
    if reads_samples(split) or split.block is not None or not is_tensor(split.y):
        return [sorted(rows)]
    targets = split.y.reshape(len(split), -1)
    extremes = {int(targets.amin(1).argmin()), int(targets.amax(1).argmax())}
    return [sorted(rows), sorted({0, len(split) - 1} | extremes)]


def mismatch_remedy(loss_func: nn.Module, x: Any, y: Any, logits: Any) -> str:
    """What to change so that model, loss and data fit together, as dtypes and shapes tell."""
    if not (is_tensor(x) and is_tensor(y) and (logits is None or is_tensor(logits))):
        return "change the model, the loss or data"
    if logits is None:
        if x.dtype != torch.float32:
            return f"x is {x.dtype}: make it float32 with x.float(), or change the model"
        return "change model.in_features, model.out_features or data"
    if target_weights(loss_func) is not None:
        if y.ndim == logits.ndim and y.shape[1:] == (1,) and logits.shape[1] > 1:
            return "y is (rows, 1): make it class numbers (rows,) with y.squeeze(1).long()"
        if y.shape == logits.shape and not y.is_floating_point():
            return "y looks one-hot: make it class numbers with y.argmax(1), or y.float()"
        if y.is_floating_point() and y.ndim == logits.ndim - 1:
            return f"y holds class numbers as {y.dtype}: make them int64 with y.long()"
        if not y.is_floating_point() and y.dtype not in (torch.int64, torch.uint8):
            return f"y is {y.dtype}: make it int64 with y.long()"
        if not y.is_floating_point() and y.ndim == logits.ndim - 1 and y.min() < 0:
            lowest = int(y.min())
            return f"y holds the class {lowest}: correct it, or ignore it with loss.ignore_index"
    elif isinstance(loss_func, nn.BCELoss | nn.BCEWithLogitsLoss):
        if (*y.shape, 1) == logits.shape:
            return "give the targets a second dimension, y[:, None], or squeeze(1) the outputs"
        if y.shape == logits.shape and not y.is_floating_point():
            return f"y is {y.dtype}: make it float32 with y.float()"
    return "change model.in_features, model.out_features or data"
