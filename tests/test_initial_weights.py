"""init: a model starts from the weights of a run or of a safetensors file."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from saved_runs import SMALL, assert_same_run, call, go_on, record, stop_after
from torch import Tensor, nn

from experiments import job, reproduce
from experiments.config.schema import OPTIONAL_ROOTS
from experiments.data import Data
from experiments.directory.checkpoints import Checkpoints
from experiments.directory.fingerprint import fingerprint
from experiments.directory.identity import differences, identify
from experiments.directory.record import built_part, config_text
from experiments.errors import UsageError
from experiments.saved import load_run
from experiments.training.initial_weights import load_initial, read_initial
from experiments.training.models import mlp

Compose = Callable[[list[str]], dict[str, Any]]
NONE: dict[str, Any] = OPTIONAL_ROOTS["init"]


@pytest.fixture(scope="module")
def source(compose: Compose, tiny: Data, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to start from."""
    path = tmp_path_factory.mktemp("source") / "run"
    go_on(path, compose(SMALL), tiny)
    return path


def weights(path: Path, which: Any = "best") -> dict[str, Tensor]:
    content = Checkpoints(path / "checkpoints").load(which)
    assert content is not None
    model: dict[str, Tensor] = content["model"]
    return model


def started(model: nn.Module, **init: Any) -> dict[str, Tensor]:
    """The model's weights after it has started from others."""
    initial = read_initial({**NONE, **init})
    assert initial is not None
    load_initial(model, initial)
    return model.state_dict()


@pytest.mark.parametrize("which", ["best", "last"])
def test_a_run_begins_with_the_weights_of_a_checkpoint_and_records_their_digest(
    which: str, source: Path, compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, f"init.run={source}", f"init.checkpoint={which}"])
    go_on(tmp_path / "run", config, tiny)
    entries = Checkpoints(source / "checkpoints").entries()
    file = [entry for entry in entries if which == "last" or entry.best][-1].file
    found = record(tmp_path / "run")
    assert found["weights"]["initial"] == fingerprint(weights(source, which))
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found["init"] == {f"init.run={source} ({which})": digest}


def test_of_averaged_weights_the_averages_are_taken(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", compose([*SMALL, "callbacks=[ema]"]), tiny)
    found = started(mlp(784, [16], 10), run=str(tmp_path / "run"))
    expected = load_run(tmp_path / "run").model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["0.weight"], weights(tmp_path / "run")["0.weight"])


def test_a_safetensors_file_holds_weights_by_name(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = mlp(4, [3], 2).state_dict()
    safetensors.torch.save_file(expected, tmp_path / "x.safetensors")
    found = started(mlp(4, [3], 2), file=str(tmp_path / "x.safetensors"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_the_file_of_a_checkpoint_gives_its_model(source: Path) -> None:
    file = Checkpoints(source / "checkpoints").entries()[-1].file
    found = started(mlp(784, [16], 10), file=str(file))
    assert torch.equal(found["0.weight"], weights(source, "last")["0.weight"])


def test_another_dtype_is_converted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {name: t.half() for name, t in mlp(4, [], 2).state_dict().items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    found = started(mlp(4, [], 2), file=str(tmp_path / "x.safetensors"))
    assert torch.equal(found["0.weight"], tensors["0.weight"].float())
    assert "x.safetensors: torch.float16 becomes torch.float32\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("init", "taken"),
    [
        ({"exclude": "2"}, {"0.weight", "0.bias"}),
        ({"match": "0"}, {"0.weight", "0.bias"}),
        ({"match": ["*.bias"], "exclude": [2]}, {"0.bias"}),
    ],
)
def test_names_that_are_left_out_keep_their_own_weights(
    init: dict[str, Any], taken: set[str], source: Path
) -> None:
    model = mlp(784, [16], 10)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    found = started(model, run=str(source), **init)
    theirs = weights(source)
    assert {name for name in found if torch.equal(found[name], theirs[name])} == taken
    assert {name for name in found if torch.equal(found[name], before[name])} == (
        before.keys() - taken
    )


def test_a_layer_without_a_shape_yet_takes_that_of_the_weights(source: Path) -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.ReLU(), nn.LazyLinear(10))
    started(model, run=str(source))
    assert torch.equal(model(torch.ones(1, 784)), load_run(source).model(torch.ones(1, 784)))


@pytest.mark.parametrize(
    ("model", "init", "line"),
    [
        (mlp(784, [16], 5), {},
         "2.weight is (10, 16) there and (5, 16) in the model; 2.bias is (10,) there and (5,) in "
         "the model; leave them out with init.exclude=[2]"),
        (mlp(784, [16, 16], 10), {},
         "2.weight is (10, 16) there and (16, 16) in the model; 2.bias is (10,) there and (16,) in "
         "the model; there is no 4.weight, 4.bias; leave them out with init.exclude=[2,4]"),
        (mlp(784, [], 16), {},
         "the model has no 2.weight, 2.bias; leave them out with init.exclude=[2]"),
        (nn.Linear(2, 2), {}, "there is no weight, bias; the model has no 0.weight, 0.bias, "
         "2.weight and 1 more; are they of another model?"),
        (mlp(784, [16], 5), {"match": "2.weight"}, "2.weight is (10, 16) there and (5, 16) in"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_told_in_one_line_with_both_shapes(
    model: nn.Module, init: dict[str, Any], line: str, source: Path
) -> None:
    with pytest.raises(UsageError) as error:
        started(model, run=str(source), **init)
    assert str(error.value).startswith(f"init.run={source} (best): {line}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("hidden", [[16], [16, 16], []])
def test_the_remedy_for_weights_that_do_not_fit_works(hidden: list[int], source: Path) -> None:
    with pytest.raises(UsageError) as error:
        started(mlp(784, hidden, 16), run=str(source))
    words = str(error.value).rpartition("init.exclude=[")[2].removesuffix("]").split(",")
    started(mlp(784, hidden, 16), run=str(source), exclude=words)


@pytest.mark.parametrize(
    ("init", "line"),
    [
        ({"match": "head"}, "init.match=head: no weight has such a name; there is 0.weight, 0."),
        ({"exclude": ["head"]}, "init.exclude=head: no weight has such a name; there is 0.we"),
        ({"exclude": "*"}, "init.exclude=['*']: leaves nothing of init.run="),
        ({"run": "nowhere"}, "init.run=nowhere: no such directory"),
        ({"run": None, "file": "nowhere"}, "init.file=nowhere: no such file"),
        ({"run": str(Path(__file__).parent)}, f"init.run={Path(__file__).parent}: has no check"),
        ({"run": None, "file": __file__}, f"init.file={__file__}: is no safetensors file ("),
    ],
    ids=lambda value: None if isinstance(value, str) else str(sorted(value)),
)  # fmt: skip
def test_what_there_is_nothing_to_start_from_is_refused_in_one_line(
    init: dict[str, Any], line: str, source: Path
) -> None:
    with pytest.raises(UsageError) as error:
        started(mlp(784, [16], 10), **{"run": str(source), **init})
    assert str(error.value).replace("[*]", "['*']").startswith(line)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["init.run=a", "init.file=b"], "init.file=b: there is init.run, too"),
        (["init.exclude=head"], "init.exclude=head: there is nothing to choose from; set init.run"),
        (["init.run=a", "init.checkpoint=newest"], "init.checkpoint=newest: expected one of best"),
    ],
)  # fmt: skip
def test_a_config_with_two_sources_or_a_choice_from_none_is_refused(
    overrides: list[str], line: str, compose: Compose
) -> None:
    with pytest.raises(UsageError) as error:
        compose(overrides)
    assert str(error.value).startswith(line)


def test_a_run_before_its_first_validation_has_a_last_checkpoint_only(
    compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    go_on(tmp_path / "run", compose(SMALL), tiny, stop_after(2))
    with pytest.raises(UsageError, match=r"has no best checkpoint; use init\.checkpoint=last"):
        started(mlp(784, [16], 10), run=str(tmp_path / "run"))
    started(mlp(784, [16], 10), run=str(tmp_path / "run"), checkpoint="last")


def test_a_damaged_checkpoint_is_not_replaced_by_another_one(source: Path, tmp_path: Path) -> None:
    shutil.copytree(source, tmp_path / "run")
    for entry in Checkpoints(tmp_path / "run" / "checkpoints").entries():
        data = bytearray(entry.file.read_bytes())
        data[-1] ^= 1
        entry.file.write_bytes(data)
    with pytest.raises(UsageError, match=r"safetensors is damaged; use another checkpoint or run$"):
        started(mlp(784, [16], 10), run=str(tmp_path / "run"))


# Without the source, or with another one


def test_a_stopped_run_goes_on_exactly_without_its_source(
    source: Path,
    compose: Compose,
    tiny: Data,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(source, tmp_path / "source")
    config = compose([*SMALL, f"init.run={tmp_path / 'source'}", "optimizer.freeze=0"])
    go_on(tmp_path / "unbroken", config, tiny)
    go_on(tmp_path / "run", config, tiny, stop_after(3))
    shutil.rmtree(tmp_path / "source")
    capsys.readouterr()
    go_on(tmp_path / "run", config, tiny)
    assert "warning" not in capsys.readouterr().err
    assert_same_run(tmp_path / "run", tmp_path / "unbroken")


def test_a_run_that_starts_from_another_is_reproduced_and_without_it_refused(
    source: Path,
    compose: Compose,
    tiny: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(job, "load_data", lambda config: tiny)
    shutil.copytree(source, tmp_path / "source")
    go_on(tmp_path / "run", compose([*SMALL, f"init.run={tmp_path / 'source'}"]), tiny)
    assert call(reproduce.main, tmp_path / "run", "--into", tmp_path / "same") == 0
    assert "identical: all" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "source")
    assert call(reproduce.main, tmp_path / "run", "--into", tmp_path / "refused") == 2
    assert "no such directory; starting from its weights needs it" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


def test_other_weights_at_the_source_are_a_difference_and_none_are_not(
    source: Path, compose: Compose, tiny: Data, tmp_path: Path
) -> None:
    shutil.copytree(source, tmp_path / "source")
    config = compose([*SMALL, f"init.run={tmp_path / 'source'}"])
    before = identify(config)
    name = f"init.run={tmp_path / 'source'} (best)"
    assert list(before["init"]) == [name]
    assert differences(before, identify(config)) == []
    shutil.rmtree(tmp_path / "source")
    assert differences(before, identify(config)) == []
    go_on(tmp_path / "source", compose([*SMALL, "seed=1"]), tiny)
    assert differences(before, identify(config)) == [f"{name} has other weights"]


def test_a_config_of_before_is_that_of_a_run_from_random_weights(compose: Compose) -> None:
    config = compose(SMALL)
    before = {key: node for key, node in config.items() if key != "init"}
    assert built_part(config_text(before)) == built_part(config_text(config))
    assert "init" not in identify(before)
    other = compose([*SMALL, "init.run=a"])
    assert built_part(config_text(other)) != built_part(config_text(config))


def test_a_path_to_start_from_is_saved_as_an_absolute_one(compose: Compose) -> None:
    assert compose(["init.run=a"])["init"]["run"] == str(Path("a").absolute())
    assert compose(["init.file=a.st"])["init"]["file"] == str(Path("a.st").absolute())


def test_weights_that_are_not_finite_are_refused_by_their_name(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    damaged = {"weight": torch.ones(2, 3), "bias": torch.tensor([0.0, torch.nan])}
    safetensors.torch.save_file(damaged, file)
    with pytest.raises(UsageError, match=r"bias holds NaN or infinite .* init\.exclude=\[bias\]"):
        started(nn.Linear(3, 2), file=str(file))
    assert started(nn.Linear(3, 2), file=str(file), exclude=["bias"])["weight"].eq(1).all()
