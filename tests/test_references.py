import pytest

from experiments.config.references import references, referred_roots, resolvers_used


@pytest.mark.parametrize(
    ("config", "roots"),
    [
        ({"model": {"hidden": ["${width}", 3]}}, {"width"}),
        ({"model": {"hidden": "${sizes.small.0}"}}, {"sizes"}),
        ({"model": {"hidden": "${sizes[0]}"}}, {"sizes"}),
        ({"data": {"path": "a/${ name }/${now:%H}-${tag}"}}, {"name", "tag"}),
        ({"model": {"hidden": "${mul:${width},2}"}}, {"width"}),
        ({"model": {"hidden": "${eval:'${a} + ${b}'}"}}, {"a", "b"}),
        ({"model": {"hidden": "${table.${kind}}"}}, {"table", "kind"}),
        ({"model": {"hidden": "${oc.select:width,3}"}}, {"width"}),
        ({"model": {"net": {"depth": "${.width}"}}}, {"model"}),
        ({"model": {"net": {"depth": "${..width}"}}}, {"model"}),
        ({"model": {"net": {"depth": "${...width}"}}}, {"width"}),
        ({"model": {"hidden": ["${..width}"]}}, {"model"}),
        ({"model": {"hidden": r"\${width}"}}, set()),
        ({"model": {"hidden": "width"}}, set()),
    ],
)
def test_the_root_keys_that_a_config_refers_to(config: object, roots: set[str]) -> None:
    assert referred_roots(references(config)) == roots


def test_the_resolvers_that_a_config_calls() -> None:
    config = {"a": "${mul:${b},${oc.env:X}}", "b": ["${add:1,2}", "${a}"]}
    assert resolvers_used(references(config)) == {"mul", "oc.env", "add"}
