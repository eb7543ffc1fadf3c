import itertools
import math
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from experiments.config.arguments import sweep_directory
from experiments.config.compose import CONF, CONFIG_ERRORS
from experiments.config.cuda import cuda_devices
from experiments.config.hydra_versions import VERSION_BASE
from experiments.config.names import flatten, quote_value, suggest
from experiments.config.rules import choice, list_of, number, or_null
from experiments.config.schema import (
    ADDED_LATER,
    CLOSED,
    GROUPS,
    OPTIONAL_ROOTS,
    SCHEMA,
    check_value,
)
from experiments.config.search_path import list_options
from experiments.config.slips import explain
from experiments.errors import UsageError

Compose = Callable[[list[str]], dict[str, Any]]

OPTIONS = sorted((file.parent.name, file.stem) for file in CONF.glob("*/*.yaml"))
EXPERIMENTS = sorted(CONF.glob("experiment/*.yaml"))


def usage_error(compose: Compose, overrides: list[str]) -> str:
    """The error message for overrides that must not compose."""
    try:
        compose(overrides)
    except UsageError as error:
        return str(error)
    except CONFIG_ERRORS as error:
        return str(explain(error, [CONF], overrides))
    pytest.fail(f"{overrides} composed")


# Rules


@given(st.floats(), st.floats(-1e6, 1e6), st.floats(0, 1e6))
def test_number_accepts_exactly_the_finite_values_within_bounds(
    value: float, low: float, width: float
) -> None:
    high = low + width
    inside = math.isfinite(value) and low <= value <= high
    assert number(low=low, high=high).accepts(value) == inside


@given(st.floats(-1e6, 1e6))
def test_above_and_below_exclude_the_bound_itself_and_low_and_high_include_it(bound: float) -> None:
    assert not number(above=bound).accepts(bound)
    assert not number(below=bound).accepts(bound)
    assert number(low=bound).accepts(bound)
    assert number(high=bound).accepts(bound)


@given(st.integers())
def test_whole_number_accepts_integers_but_no_float_of_the_same_value(value: int) -> None:
    assert number(whole=True).accepts(value)
    assert not number(whole=True).accepts(value / 1 if abs(value) < 2**53 else 1.0)


def test_a_number_of_four_hundred_digits_is_refused_like_any_other_too_large_one() -> None:
    with pytest.raises(UsageError, match="seed=1000"):
        check_value("seed", 10**400)


@pytest.mark.parametrize("value", [True, False, "1", None, [1], {}, math.nan, math.inf, -math.inf])
def test_number_refuses_what_is_no_finite_number(value: object) -> None:
    assert not number().accepts(value)


def test_choice_accepts_its_words_alone() -> None:
    rule = choice("red", "green")
    assert rule.accepts("red")
    assert not rule.accepts("blue")
    assert not rule.accepts(["red"])
    assert rule.words == "one of red, green"


@given(st.lists(st.integers(-3, 3)))
def test_list_of_accepts_a_list_when_its_rule_accepts_every_item(items: list[int]) -> None:
    assert list_of(number(low=0)).accepts(items) == all(item >= 0 for item in items)
    assert list_of(number(), length=2).accepts(items) == (len(items) == 2)


def test_list_of_refuses_what_is_no_list() -> None:
    assert not list_of(number()).accepts(3)
    assert not list_of(choice("a", "b")).accepts("ab")


def test_or_null_adds_null_and_nothing_else() -> None:
    rule = or_null(number(above=0))
    assert rule.accepts(None)
    assert rule.accepts(1)
    assert not rule.accepts(0)
    assert not rule.accepts("null")


@pytest.mark.parametrize("key", SCHEMA)
def test_every_rule_refuses_a_value_of_the_wrong_type_naming_key_and_expectation(key: str) -> None:
    with pytest.raises(UsageError) as error:
        check_value(key, {})
    assert str(error.value) == f"{key}={{}}: expected {SCHEMA[key].words}"


@pytest.mark.parametrize(
    ("key", "good", "bad"),
    [
        ("seed", 0, -1),
        ("seed", 2**63 - 1, 2**63),
        ("loader.batch_size", 1, 0),
        ("loader.batch_size", 64, 64.5),
        ("loader.shuffle", False, 0),
        ("model.hidden", [], [0]),
        ("model.hidden", [128, 256], 128),
        ("model.dropout", 0, 1),
        ("optimizer.lr", 1e-9, 0),
        ("optimizer.momentum", 0.999, 1.0),
        ("optimizer.betas", [0.9, 0.999], [0.9]),
        ("optimizer.weight_decay", 0, -0.1),
        ("loss.label_smoothing", 1, 1.1),
        ("scheduler.pct_start", 0.0, -0.1),
        ("trainer.epochs", 1, 0),
        ("trainer.device", "cpu", "gpu"),
        ("trainer.clip_norm", None, 0),
        ("trainer.monitor", "accuracy/valid", "loss/train"),
        ("checkpoint.every_steps", None, 0),
        ("checkpoint.every_seconds", 0.5, 0),
        ("data.path", None, ""),
    ],
)
def test_the_schema_draws_the_line_between(key: str, good: object, bad: object) -> None:
    check_value(key, good)
    with pytest.raises(UsageError, match=f"^{re.escape(key)}="):
        check_value(key, bad)


def test_a_value_is_shown_as_it_is_written_on_the_command_line() -> None:
    with pytest.raises(UsageError, match=re.escape("optimizer.betas=[true,null,0.5]: ")):
        check_value("optimizer.betas", [True, None, 0.5])


# Composing and validating


def test_every_group_has_an_option_on_disk() -> None:
    assert {group for group, _ in OPTIONS} >= {*GROUPS, "experiment"}


# What an option leaves to the command line.
LEFT_OPEN = {"fine_tuning": ["init.run=DIR"]}


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes_and_validates(
    group: str, option: str, compose: Compose
) -> None:
    compose([f"{group}={option}", *LEFT_OPEN.get(option, [])])


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_key_that_an_option_brings_has_a_rule(
    group: str, option: str, compose: Compose
) -> None:
    config = compose([f"{group}={option}", *LEFT_OPEN.get(option, [])])
    keys = [key for key, _ in flatten(config)]
    assert [key for key in keys if "._" not in key and key not in SCHEMA] == []


def test_a_value_of_a_named_augmentation_is_checked_and_that_of_ones_own_is_not(
    compose: Compose,
) -> None:
    wrong = ["augment=flip", "augment.flip.probability=2"]
    assert usage_error(compose, wrong).startswith("augment.flip.probability=2: expected ")
    assert compose([*wrong, "augment.flip._target_=mine.flip"])["augment"]["flip"]


@pytest.mark.parametrize("file", EXPERIMENTS, ids=lambda file: file.stem)
def test_every_experiment_opens_with_the_command_that_runs_it_and_differs_from_the_default(
    file: Path, compose: Compose
) -> None:
    override, left_open = f"experiment={file.stem}", LEFT_OPEN.get(file.stem, [])
    opening = itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines())
    assert " ".join(["# python -m experiments", override, *left_open]) in opening
    assert compose([override, *left_open]) != compose([])


def test_every_option_offered_in_a_comment_of_the_config_is_accepted(compose: Compose) -> None:
    """The options listed after `device:` are those of the schema."""
    comment = (CONF / "trainer" / "default.yaml").read_text().partition("device:")[2]
    for word in ("auto", "cpu", "cuda"):
        assert word in comment.partition("\n")[0]
        check_value("trainer.device", word)


def test_an_experiment_changes_what_it_names_and_the_command_line_changes_it_again(
    compose: Compose,
) -> None:
    default, tutorial = compose([]), compose(["experiment=tutorial"])
    assert (tutorial["optimizer"]["lr"], tutorial["trainer"]["epochs"]) == (0.001, 25)
    assert tutorial["model"] == default["model"]
    assert compose(["experiment=tutorial", "optimizer.lr=0.5"])["optimizer"]["lr"] == 0.5


def test_a_validated_config_is_plain_and_without_hydra(compose: Compose) -> None:
    config = compose([])
    assert set(config) == {"seed", "init", "checkpoint", *GROUPS}
    values = [value for _, value in flatten(config)]
    assert {type(value) for value in values} <= {bool, int, float, str, list, type(None)}


def test_references_are_resolved(compose: Compose) -> None:
    config = compose(["optimizer.lr=0.25", "scheduler=onecycle"])
    assert config["scheduler"]["max_lr"] == 0.25


def test_a_relative_data_path_is_made_absolute(compose: Compose) -> None:
    assert compose(["data.path=here"])["data"]["path"] == str(Path.cwd() / "here")


def test_a_target_may_take_keys_of_its_own(compose: Compose) -> None:
    assert compose(["+model.bias=false"])["model"]["bias"] is False


@pytest.mark.skipif(cuda_devices() > 0, reason="there is a CUDA device")
def test_cuda_where_there_is_none_names_the_remedy(compose: Compose) -> None:
    line = usage_error(compose, ["trainer.device=cuda"])
    assert line.startswith("trainer.device=cuda: ")
    assert line.endswith("use cpu or auto")


# Rules and the targets that they were written for


@pytest.mark.parametrize(
    "overrides",
    [
        ["model._target_=own.Model", "model.hidden=128"],
        ["scheduler=cosine", "scheduler._target_=own.warm_up", "scheduler.warmup=500"],
        ["scheduler=constant", "optimizer._target_=own.Optimizer", "optimizer.lr=auto"],
        ["optimizer=adam", "optimizer._target_=torch.optim.Adafactor", "optimizer.eps=[null,1e-3]"],
        ["loss._target_=own.loss", "loss.label_smoothing=2"],
        ["data._target_=own.load", "data.path=[a,b]"],
    ],
    ids=lambda overrides: overrides[-1],
)
def test_another_target_may_have_keys_of_the_same_names(
    overrides: list[str], compose: Compose
) -> None:
    compose(overrides)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["optimizer._target_=torch.optim.RMSprop", "optimizer.lr=-1"], "optimizer.lr"),
        (["loader._target_=own.Loader", "loader.batch_size=0"], "loader.batch_size"),
        (["model._target_=experiments.models.mlp", "model.hidden=128"], "model.hidden"),
        (["model=linear", "model.in_features=0"], "model.in_features"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else value,
)
def test_a_rule_holds_for_what_it_was_written_for(
    overrides: list[str], key: str, compose: Compose
) -> None:
    assert usage_error(compose, overrides).startswith(f"{key}=")


# Keys at the root


def test_a_root_key_may_have_any_name_if_something_refers_to_it(compose: Compose) -> None:
    config = compose(["+width=64", "model.hidden=[${width},${width}]"])
    assert (config["width"], config["model"]["hidden"]) == (64, [64, 64])


def test_notes_need_no_reference(compose: Compose) -> None:
    assert compose(["+extra.tags=[a,b]"])["extra"] == {"tags": ["a", "b"]}


def test_a_key_that_is_added_has_a_value_for_the_configs_of_before() -> None:
    first = {"epochs", "device", "threads", "log_every", "clip_norm", "accumulate", "monitor"}
    first |= {"every_steps", "every_seconds", "keep"}
    closed = [key for key in SCHEMA if key.partition(".")[0] in {*CLOSED} - {*OPTIONAL_ROOTS}]
    assert set(ADDED_LATER) == {key for key in closed if key.partition(".")[2] not in first}


def test_a_root_key_that_nothing_refers_to_is_told_where_notes_go(compose: Compose) -> None:
    line = usage_error(compose, ["+tags=[a,b]"])
    assert line == "tags: unknown key, and nothing refers to it; a note belongs under extra.tags"


# One-line error messages


@pytest.mark.parametrize(
    ("override", "line"),
    [
        ("optimizer.lrr=1", "optimizer.lrr: unknown key; did you mean optimizer.lr?"),
        ("loader.shufle=0", "loader.shufle: unknown key; did you mean loader.shuffle?"),
        ("trainer.epoch=3", "trainer.epoch: unknown key; did you mean trainer.epochs?"),
        ("+trainer.epoch=3", "trainer.epoch=3: unknown key; did you mean trainer.epochs?"),
        ("+trainer.epochs=3", "+trainer.epochs: the config has this key already; leave the + out"),
        ("optimizer=", "optimizer=: no such option; there is optimizer=adam, optimizer=adamw, "
         "optimizer=sgd"),
        ("lr=3", "lr: unknown key; did you mean optimizer.lr?"),
        ("batch_size=3", "batch_size: unknown key; did you mean loader.batch_size?"),
        ("sed=3", "sed: unknown key; did you mean seed?"),
        ("resum=outputs/x", "resum: unknown key; did you mean resume?"),
        ("sweeps=first", "sweeps: unknown key; did you mean sweep?"),
        ("modle=mlp", "modle: unknown key; did you mean model?"),
        ("+optimiser=adam", "optimiser: unknown key; did you mean optimizer?"),
        ("metrics=[acuracy]", "metrics=acuracy: no such option; did you mean metrics=accuracy?"),
        ("callbacks=[ema,ea]", "callbacks=ea: no such option; did you mean callbacks=ema?"),
        ("model=mlpp", "model=mlpp: no such option; did you mean model=mlp?"),
        ("optimizer=Adamw", "optimizer=Adamw: no such option; did you mean optimizer=adamw?"),
        ("scheduler=cosin", "scheduler=cosin: no such option; did you mean scheduler=cosine?"),
        ("scheduler.every=epoch", "scheduler.every: unknown key; add it with +scheduler.every=step "
         "or +scheduler.every=epoch"),
        ("optimizer.lr=fast", "optimizer.lr=fast: expected a number above 0"),
        ("optimizer.lr=null", "optimizer.lr=null: expected a number above 0"),
        ('trainer.epochs="45"', "trainer.epochs='45': expected a whole number at least 1"),
        ("trainer.epochs=2.5", "trainer.epochs=2.5: expected a whole number at least 1"),
        ("trainer.epochs=true", "trainer.epochs=true: expected a whole number at least 1"),
        ("optimizer.momentum=1", "optimizer.momentum=1: expected a number at least 0 and below 1"),
        ("model.hidden=6", "model.hidden=6: expected a list, [...], of a whole number at least 1"),
        ("loader.shuffle=maybe", "loader.shuffle=maybe: expected true or false"),
        ("optimizer.lr=${nope.x}", "optimizer.lr=${nope.x}: there is no key nope.x"),
        ("seed=???", "seed=???: this key has no value yet; give it one"),
        ("optimizer.lr=???", "optimizer.lr=???: this key has no value yet; give it one"),
        ("optimizer.lr=1,2", "optimizer.lr=1,2: several values need --multirun; a list is [1,2]"),
        ("optimiser.lr=1", "optimiser.lr: unknown key; did you mean optimizer.lr?"),
        ("modle.hidden=[3]", "modle.hidden: unknown key; did you mean model.hidden?"),
        ("~model.nope", "~model.nope: the config has no model.nope, or it is null; leave it out"),
        ("+model=mlp", "+model=mlp: the config has chosen its model already; leave the + out"),
        (
            "optimizer.lr=${oc.env:NOPE}",
            "optimizer.lr=${oc.env:NOPE}: the environment variable NOPE is not set",
        ),
        ("optimizer.lr=${div:1,0}", "optimizer.lr: division by zero"),
        ("~trainer.epochs", "trainer.epochs is missing: expected a whole number at least 1"),
    ],
)  # fmt: skip
def test_a_slip_is_told_in_one_line(override: str, line: str, compose: Compose) -> None:
    assert usage_error(compose, [override]) == line


@pytest.mark.parametrize(
    "override", ["optimizer.lr", "optimizer.lr=[1", "model.hidden=[1,2", "a=b=c:{"]
)
def test_a_syntax_error_is_told_with_the_override_and_how_to_write_it(
    override: str, compose: Compose
) -> None:
    line = usage_error(compose, ["seed=1", override])
    assert line.startswith(f"{override}: not an override (")
    assert line.endswith("write key=value, quoted for the shell")


@pytest.mark.parametrize("override", ["=3", "~model", "model=null", "trainer=3"])
def test_other_slips_are_told_in_one_line_that_names_them(override: str, compose: Compose) -> None:
    line = usage_error(compose, [override])
    assert "\n" not in line
    assert override.strip("~+").partition("=")[0] in line


def test_a_key_that_resembles_nothing_is_told_without_a_false_hint(compose: Compose) -> None:
    assert "did you mean" not in usage_error(compose, ["xylophone=1"])


@given(st.sampled_from(sorted(SCHEMA)), st.data())
def test_a_key_with_one_letter_left_out_still_leads_to_that_key(
    key: str, data: st.DataObject
) -> None:
    """At least 4 letters: shorter keys become ambiguous."""
    node, _, name = key.rpartition(".")
    siblings = [known.rpartition(".")[2] for known in SCHEMA if known.rpartition(".")[0] == node]
    if len(name) < 4:
        return
    place = data.draw(st.integers(0, len(name) - 1))
    slip = name[:place] + name[place + 1 :]
    if slip not in siblings:
        assert suggest(slip, siblings) == f"; did you mean {name}?"


def test_without_a_near_word_all_are_listed_where_they_are_few() -> None:
    assert (
        suggest("zzz", ["adam", "sgd"], "optimizer=") == "; there is optimizer=adam, optimizer=sgd"
    )
    assert suggest("zzz", [f"option{i}" for i in range(100)]) == ""


def test_a_file_that_is_no_yaml_is_told_in_one_line_with_the_place(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text("model: {hidden: [1\n")
    with (
        initialize_config_dir(str(tmp_path), **VERSION_BASE),
        pytest.raises(CONFIG_ERRORS) as error,
    ):
        hydra.compose("mine")
    line = str(explain(error.value, [CONF], []))
    assert re.match(r"^\S*mine.yaml: line \d+, column \d+: not YAML \(.*\)$", line)


def test_groups_lists_options_of_several_directories_together(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").touch()
    options = list_options([CONF, tmp_path])
    assert {"mine", "mlp"} <= set(options["model"])
    assert options["optimizer"] == list_options([CONF])["optimizer"]


@pytest.mark.parametrize(
    ("word", "quoted"),
    [
        ("sweep=été", "sweep='été'"),
        ("data.path=/a b/ü (1)", "data.path='/a b/ü (1)'"),
        ("data.path=it's", r"data.path='it\'s'"),
        ("hydra.run.dir=out/ü-${now:%Y}", "hydra.run.dir='out/ü-${now:%Y}'"),
        ("model=größe,klein", "model='größe',klein"),
    ],
)
def test_a_value_that_hydra_takes_only_in_quotes_gets_them(word: str, quoted: str) -> None:
    assert quote_value(word) == quoted
    OverridesParser.create().parse_override(quoted)


@pytest.mark.parametrize(
    "word",
    [
        *("seed=0", "data.path=/a b/c", "optimizer.lr=choice(0.1,0.2)", "data.path='ü'"),
        *("hydra.run.dir=out/${now:%Y}", "data.path=choice(a,b)", "model.hidden=[1", "~seed"),
        *("optimizer.lr=0.1,0.2", "+x={a: ü}", r"+x='it\'s'", "data.path="),
    ],
)
def test_a_value_that_hydra_reads_by_itself_or_not_at_all_is_left_as_it_is(word: str) -> None:
    assert quote_value(word) == word


@pytest.mark.parametrize(
    ("word", "override"),
    [
        ("sweep=first", "hydra.sweep.dir=outputs/first"),
        ("sweep=a/b", "hydra.sweep.dir=outputs/a/b"),
        ("sweep=outputs/first/", "hydra.sweep.dir=outputs/first"),
        ("sweep=/abs/first", "hydra.sweep.dir=/abs/first"),
        ("seed=0", "seed=0"),
    ],
)
def test_a_sweeps_name_is_a_directory_below_outputs_or_a_path_to_one(
    word: str, override: str
) -> None:
    assert sweep_directory(word) == override


@pytest.mark.parametrize("group", ["metrics", "callbacks"])
def test_options_that_a_file_lists_as_a_value_are_told_where_they_belong(
    group: str, cli: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    file = tmp_path / "mine" / "experiment" / "listed.yaml"
    file.parent.mkdir(parents=True)
    file.write_text(f"# @package _global_\n{group}: [ema]\n")
    completed = cli("--config-dir", "mine", "experiment=listed")
    assert (completed.returncode, completed.stdout) == (2, "")
    assert "experiment=listed: a list stands where a mapping is expected" in completed.stderr
    assert "under defaults, as - override /metrics: [accuracy]" in completed.stderr
