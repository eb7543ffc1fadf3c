from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from saved_runs import SMALL, go_on, record
from torch import nn

from experiments.config.compose import CONF
from experiments.data import Data, Split
from experiments.data.loaders import TensorLoader, evaluation_options
from experiments.errors import UsageError
from experiments.saved import load_run
from experiments.training.build import build
from experiments.training.determinism import prepare_torch
from experiments.training.fit import evaluate
from experiments.training.models import mlp
from experiments.training.parts import build_model, check_fit

widths = st.lists(st.integers(1, 20), max_size=4)


def linears(model: nn.Module) -> list[tuple[int, int]]:
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    return [(layer.in_features, layer.out_features) for layer in layers]


@given(
    st.integers(1, 20), widths, st.integers(1, 10), st.integers(0, 5), st.sampled_from([0.0, 0.5])
)
def test_a_batch_of_rows_gives_a_batch_of_logits(
    width_in: int, hidden: list[int], width_out: int, batch: int, dropout: float
) -> None:
    logits = mlp(width_in, hidden, width_out, dropout)(torch.zeros(batch, width_in))
    assert logits.shape == (batch, width_out)
    assert logits.dtype == torch.float32


@given(st.integers(1, 20), widths, st.integers(1, 10))
def test_hidden_lists_the_widths_between_input_and_output(
    width_in: int, hidden: list[int], width_out: int
) -> None:
    model = mlp(width_in, hidden, width_out)
    assert linears(model) == list(pairwise([width_in, *hidden, width_out]))
    assert sum(isinstance(layer, nn.ReLU) for layer in model) == len(hidden)


def test_the_default_model_has_136074_parameters(
    compose: Callable[[list[str]], dict[str, Any]],
) -> None:
    """784-128-256-10 with biases."""
    model = build(compose([]), "model")
    assert linears(model) == [(784, 128), (128, 256), (256, 10)]
    expected = 784 * 128 + 128 + 128 * 256 + 256 + 256 * 10 + 10
    assert sum(p.numel() for p in model.parameters()) == expected == 136_074


def test_relu_is_between_the_layers_and_not_after_the_last() -> None:
    torch.manual_seed(0)
    model = mlp(3, [4], 2)
    x = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    first, last = model[0], model[-1]
    assert torch.equal(model(x), last(first(x).clamp(min=0)))
    assert (model(x) < 0).any()


def test_dropout_zeroes_its_share_after_each_hidden_layer_in_training_only() -> None:
    model = mlp(10, [2000, 2000], 5, dropout=0.25)
    layers = [layer for layer in model if isinstance(layer, nn.Dropout)]
    assert [layer.p for layer in layers] == [0.25, 0.25]
    torch.manual_seed(0)
    x = torch.ones(3, 2000)
    assert (layers[0](x) == 0).float().mean() == pytest.approx(0.25, abs=0.03)
    model.eval()
    assert torch.equal(layers[0](x), x)


def test_without_dropout_there_is_no_such_layer() -> None:
    assert not any(isinstance(layer, nn.Dropout) for layer in mlp(3, [4, 5], 2))


@pytest.mark.parametrize("option", sorted(file.stem for file in CONF.glob("model/*.yaml")))
def test_every_model_option_gives_ten_logits_for_an_image(
    option: str, compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    model = build(compose([f"model={option}"]), "model")
    assert model(tiny.train.x[:3]).shape == (3, 10)


def test_changed_keys_reach_the_model(compose: Callable[[list[str]], dict[str, Any]]) -> None:
    config = compose(["model.hidden=[7]", "model.dropout=0.1", "model.out_features=3"])
    model = build(config, "model")
    assert linears(model) == [(784, 7), (7, 3)]
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.1]


@pytest.mark.parametrize(
    ("overrides", "remedy"),
    [
        (["model.in_features=3"], "change model.in_features, model.out_features or data"),
        (["model.out_features=4"], "change model.in_features, model.out_features or data"),
        (["model=linear", "model.out_features=1"], "change model.in_features, model.out_features"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_model_that_does_not_fit_the_data_is_refused_before_training(
    overrides: list[str],
    remedy: str,
    compose: Callable[[list[str]], dict[str, Any]],
    tiny: Data,
) -> None:
    config = compose(overrides)
    with pytest.raises(UsageError) as error:
        check_fit(config, build(config, "model"), nn.CrossEntropyLoss(), tiny.train)
    assert str(error.value).startswith("model")
    assert "x (320, 784), y (320,)" in str(error.value)
    assert remedy in str(error.value)


def test_classes_beyond_the_models_outputs_are_refused_even_if_the_first_rows_have_none(
    compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    config = compose(["model.out_features=9"])
    rows = Split(tiny.train.x, tiny.train.y.sort().values)
    with pytest.raises(UsageError, match=r"^model.out_features=9: the data has 10 classes"):
        check_fit(config, build(config, "model"), nn.CrossEntropyLoss(), rows)


# trainer.precision


@pytest.fixture
def halved(compose: Callable[[list[str]], dict[str, Any]]) -> tuple[nn.Module, nn.Module]:
    """The model in float32 and in bfloat16, with the same weights."""
    models = []
    for precision in ("float32", "bfloat16"):
        torch.manual_seed(0)
        models.append(build_model(compose([f"trainer.precision={precision}"])))
    return models[0], models[1]


def test_bfloat16_leaves_weights_and_logits_in_float32(
    halved: tuple[nn.Module, nn.Module], tiny: Data
) -> None:
    _, model = halved
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    logits = model(tiny.train.x)
    logits.sum().backward()
    assert logits.dtype == torch.float32
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def test_bfloat16_logits_are_the_float32_ones_to_its_rounding_and_no_closer(
    halved: tuple[nn.Module, nn.Module], tiny: Data
) -> None:
    exact, rounded = (model(tiny.train.x) for model in halved)
    distance = (exact - rounded).abs().max() / exact.abs().max()
    assert 1e-5 < distance < 2**-6


def test_a_saved_run_computes_in_the_precision_that_it_was_trained_in(
    compose: Callable[[list[str]], dict[str, Any]], tiny: Data, tmp_path: Path
) -> None:
    config = compose([*SMALL, "trainer.precision=bfloat16"])
    go_on(tmp_path / "run", config, tiny)
    model = load_run(tmp_path / "run", "last").model
    rows = TensorLoader(
        tiny.valid, **evaluation_options(tiny.valid, config["loader"]["batch_size"])
    )
    loss, accuracy = evaluate(model, nn.CrossEntropyLoss(), rows)
    logged = record(tmp_path / "run")["metrics"]["last"]
    assert (loss, accuracy) == (logged["loss/valid"], logged["accuracy/valid"])
    plain = build(config, "model")
    plain.load_state_dict(model.state_dict())
    assert (
        evaluate(plain, nn.CrossEntropyLoss(), TensorLoader(tiny.valid, batch_size=144))[0] != loss
    )


def test_matmul_precision_is_that_of_the_run_started_last(
    compose: Callable[[list[str]], dict[str, Any]],
) -> None:
    prepare_torch(compose(["trainer.matmul_precision=medium"])["trainer"])
    assert torch.get_float32_matmul_precision() == "medium"
    prepare_torch(compose([])["trainer"])
    assert torch.get_float32_matmul_precision() == "highest"
