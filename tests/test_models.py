import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from objectives import READ, evaluated
from saved_runs import SMALL, go_on, lines, record
from torch import Tensor, nn

from experiments.config.compose import CONF
from experiments.data import Data, Split
from experiments.data.loaders import TensorLoader, evaluation_options
from experiments.errors import UsageError
from experiments.saved import load_run
from experiments.training.build import build
from experiments.training.determinism import prepare_torch
from experiments.training.first_batch import check_fit
from experiments.training.models import mlp
from experiments.training.models.autoencoders import Autoencoder
from experiments.training.models.images import ResNet
from experiments.training.models.sequences import Transformer
from experiments.training.models.tables import TableNet
from experiments.training.objective import Objective
from experiments.training.parts import build_model

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


# what the data determines, for MNIST's rows
SIZES = {
    "autoencoder": ["model.in_features=784"],
    "convnet": ["model.image=[1,28,28]", "model.out_features=10"],
    "resnet": ["model.image=[1,28,28]", "model.out_features=10"],
    "table": ["model.numbers=784", "model.cardinalities=[]"],
    "transformer": ["model.vocabulary=2", "model.length=784"],
}


@pytest.mark.parametrize("option", sorted(file.stem for file in CONF.glob("model/*.yaml")))
def test_every_model_option_takes_images_as_its_first_line_says(
    option: str, compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    model = build(compose([f"model={option}", *SIZES.get(option, ())]), "model")
    x = tiny.train.x[:3]
    outputs = model(x.round().long() if option == "transformer" else x)
    assert outputs.shape == {"autoencoder": (3, 784), "transformer": (3, 2, 784)}.get(
        option, (3, 10)
    )
    assert outputs.dtype == torch.float32


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
        check_fit(
            config, Objective(build(config, "model"), nn.CrossEntropyLoss()), tiny.train, READ
        )
    assert str(error.value).startswith("model")
    assert "x (320, 784), y (320,)" in str(error.value)
    assert remedy in str(error.value)


def test_classes_beyond_the_models_outputs_are_refused_even_if_the_first_rows_have_none(
    compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    config = compose(["model.out_features=9"])
    rows = Split(tiny.train.x, tiny.train.y.sort().values)
    with pytest.raises(UsageError, match=r"^model.out_features=9: the data has 10 classes"):
        check_fit(config, Objective(build(config, "model"), nn.CrossEntropyLoss()), rows, READ)


def test_without_activation_and_normalization_the_names_and_initial_bits_are_what_they_were() -> (
    None
):
    torch.manual_seed(0)
    before = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Dropout(0.1), nn.Linear(4, 3))
    torch.manual_seed(0)
    model = mlp(5, [4], 3, 0.1)
    assert [*model.state_dict()] == [*before.state_dict()]
    assert all(map(torch.equal, model.state_dict().values(), before.state_dict().values()))


@pytest.mark.parametrize(
    ("normalization", "kind"), [("batch", nn.BatchNorm1d), ("layer", nn.LayerNorm)]
)
def test_a_normalization_comes_before_each_activation(
    normalization: str, kind: type[nn.Module]
) -> None:
    model = mlp(5, [4, 6], 3, 0.1, "gelu", normalization)
    hidden = [nn.Linear, kind, nn.GELU, nn.Dropout]
    assert [type(layer) for layer in model] == [*hidden, *hidden, nn.Linear]


@pytest.mark.parametrize(
    "override", ["model.activation=softmax", "model.normalization=group", "model.activation=null"]
)
def test_an_unknown_activation_or_normalization_is_refused_before_torch_is_there(
    override: str, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    with pytest.raises(UsageError, match=rf"^{override}: expected one of "):
        compose(["model=mlp_norm", override])


def test_flat_rows_are_refused_with_the_shape_that_they_may_have(
    compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    config = compose(["model=convnet", "model.in_channels=1", "model.out_features=10"])
    with pytest.raises(UsageError, match=r"flat: use model.image=\[1,28,28\]"):
        check_fit(
            config, Objective(build(config, "model"), nn.CrossEntropyLoss()), tiny.train, READ
        )


@pytest.mark.parametrize("model", ["convnet", "resnet"])
def test_an_image_model_takes_flat_rows_as_the_images_that_they_are(
    model: str, compose: Callable[[list[str]], dict[str, Any]], tiny: Data
) -> None:
    outputs = []
    for shape in ["model.image=[1,28,28]", "model.in_channels=1"]:
        torch.manual_seed(0)
        built = build(compose([f"model={model}", "model.out_features=10", shape]), "model").eval()
        flat = tiny.train.x[:3]
        outputs.append(built(flat if "image" in shape else flat.view(3, 1, 28, 28)))
    assert torch.equal(*outputs)


def test_resnet_halves_the_resolution_in_all_stages_but_the_first() -> None:
    model = ResNet(3, 10)
    shapes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    model(torch.zeros(2, 3, 32, 32))
    assert shapes == [(16, 32, 32), (32, 16, 16), (64, 8, 8)]
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert sum(m.kernel_size == (3, 3) for m in convolutions) + 1 == 20


def test_a_token_changes_no_prediction_before_it() -> None:
    torch.manual_seed(0)
    model = Transformer(7, length=6, width=8, layers=2, heads=2).eval()
    x = torch.tensor([[1, 2, 3, 4, 5, 6]])
    other = x.clone()
    other[0, 3] = 0
    changed = (model(x) != model(other)).any(1)[0]
    assert changed.tolist() == [False, False, False, True, True, True]


def test_cross_entropy_takes_the_logits_of_a_transformer_as_they_are() -> None:
    logits = Transformer(7, length=6, width=8, layers=1, heads=2)(torch.zeros(3, 5).long())
    assert logits.shape == (3, 7, 5)
    assert nn.CrossEntropyLoss()(logits, torch.zeros(3, 5).long()).ndim == 0


@pytest.mark.parametrize(
    ("x", "error"),
    [
        (torch.zeros(2, 7).long(), "its rows have 7 tokens: use model.length=7"),
        (torch.zeros(2, 5), "its rows are torch.float32 and not tokens"),
    ],
)
def test_rows_that_are_no_sequences_for_a_transformer_are_refused_in_one_line(
    x: Tensor, error: str, compose: Callable[[list[str]], dict[str, Any]]
) -> None:
    config = compose(["model=transformer", "model.vocabulary=4", "model.length=6"])
    with pytest.raises(UsageError, match=error):
        check_fit(
            config,
            Objective(build(config, "model"), nn.CrossEntropyLoss()),
            Split(x, torch.zeros_like(x)),
            READ,
        )


def test_an_autoencoder_has_the_same_widths_on_both_sides_of_its_code() -> None:
    model = Autoencoder(9, [7, 5], code=2)
    assert linears(model) == [(9, 7), (7, 5), (5, 2), (2, 5), (5, 7), (7, 9)]


COMPILED = {
    "mlp_norm": ["model.hidden=[8]", "model.normalization=layer", "model.activation=gelu"],
    "convnet": ["model.channels=[4,8]", "model.dropout=0.1"],
    "resnet": ["model.channels=[4,8]", "model.blocks=1"],
    "transformer": ["model.width=8", "model.layers=1", "model.heads=2", "model.dropout=0.1"],
    "autoencoder": ["model.hidden=[16]", "model.code=4", "loss._target_=torch.nn.MSELoss"],
}


@pytest.mark.long
@pytest.mark.parametrize("option", COMPILED)
def test_compiled_a_models_numbers_are_the_eager_ones_to_rounding(
    option: str,
    compose: Callable[[list[str]], dict[str, Any]],
    tiny: Data,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def split(rows: Split) -> Split:
        x = rows.x[:256]
        if option == "autoencoder":
            return Split(x, x)
        if option == "transformer":
            tokens = x[:, 300:320].round().long()
            return Split(tokens[:, :-1], tokens[:, 1:])
        return Split(x, rows.y[:256])

    data = Data(split(tiny.train), split(tiny.valid), split(tiny.test))
    sizes = [*SIZES.get(option, ()), "loader.batch_size=128", "trainer.log_every=1"]
    if option == "autoencoder":
        sizes.append("~loss.label_smoothing")
    config = compose(
        [f"model={option}", *sizes, *COMPILED[option], "trainer.epochs=1", "optimizer=adamw"]
    )
    numbers = []
    for compiled in (False, True):
        path = tmp_path / str(compiled)
        go_on(path, config | {"trainer": config["trainer"] | {"compile": compiled}}, data)
        numbers.append([json.loads(line) for line in lines(path)])
    for eager, line in zip(*numbers, strict=True):
        assert line == pytest.approx(eager, rel=2e-5)


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
    loss, accuracy = evaluated(model, nn.CrossEntropyLoss(), rows)
    logged = record(tmp_path / "run")["metrics"]["last"]
    assert (loss, accuracy) == (logged["loss/valid"], logged["accuracy/valid"])
    plain = build(config, "model")
    plain.load_state_dict(model.state_dict())
    assert (
        evaluated(plain, nn.CrossEntropyLoss(), TensorLoader(tiny.valid, batch_size=144))[0] != loss
    )


def test_matmul_precision_is_that_of_the_run_started_last(
    compose: Callable[[list[str]], dict[str, Any]],
) -> None:
    prepare_torch(compose(["trainer.matmul_precision=medium"])["trainer"])
    assert torch.get_float32_matmul_precision() == "medium"
    prepare_torch(compose([])["trainer"])
    assert torch.get_float32_matmul_precision() == "highest"


def test_the_model_of_tables_embeds_categories_and_scales_outputs() -> None:
    model = TableNet(2, [4, 3], 1, hidden=[8], embedding=5, target_scale=(100.0, 10.0))
    assert linears(model.layers) == [(12, 8), (8, 1)]
    x = {"numbers": torch.randn(6, 2), "categories": torch.randint(3, (6, 2))}
    plain = TableNet(2, [4, 3], 1, hidden=[8], embedding=5)
    weights = {name: t for name, t in model.state_dict().items() if name not in ("mean", "std")}
    plain.load_state_dict(weights, strict=False)
    assert torch.allclose(model(x), plain(x) * 10 + 100)
    other = {**x, "categories": 2 - x["categories"]}
    assert not model(other).equal(model(x))
