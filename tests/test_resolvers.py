import pytest
from omegaconf import OmegaConf

from experiments.config.hydra_versions import register_resolver
from experiments.config.resolvers import evaluate, register


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * 16", 32),
        ("(3 + 1) // 2 - -1", 3),
        ("7 % 4 + 2 ** 3", 11),
        ("1 / 4", 0.25),
        ("max(2, min(3, 9), round(1.6))", 3),
        ("len([1, 2]) + sum([1, 2])", 5),
        ("'big' if 3 > 2 else 'small'", "big"),
        (12, 12),
    ],
)
def test_eval_does_arithmetic(expression: object, value: object) -> None:
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    "expression", ["__import__('os')", "x", "(1).__class__", "1 +", "open('f')", "[x for x in []]"]
)
def test_eval_executes_nothing_else(expression: str) -> None:
    with pytest.raises(ValueError, match="not arithmetic"):
        evaluate(expression)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${add:1,2,3}", 6),
        ("${sub:5,2}", 3),
        ("${mul:2,3,4}", 24),
        ("${div:1,4}", 0.25),
        ("${floordiv:7,2}", 3),
        ("${min:3,2}", 2),
        ("${max:3,2}", 3),
        ("${join:-,a,1}", "a-1"),
        ("${join:-,[a,b]}", "a-b"),
        ("${lower:AB}", "ab"),
        ("${upper:ab}", "AB"),
        ("${replace:a.b,.,_}", "a_b"),
    ],
)
def test_the_built_in_resolvers(text: str, value: object) -> None:
    register()
    assert OmegaConf.create({"x": text}).x == value


def test_a_resolver_of_the_users_stays() -> None:
    OmegaConf.clear_resolver("lower")
    register_resolver("lower", lambda text: "mine")
    try:
        register()
        assert OmegaConf.create({"x": "${lower:A}"}).x == "mine"
    finally:
        OmegaConf.clear_resolver("lower")
