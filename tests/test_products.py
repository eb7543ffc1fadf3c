"""The rewritten matrix products of a compiled step: the same results from other operations."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments.compiled.package import on_threads
from experiments.compiled.products import Products
from experiments.compiled.trace import trace

aten = torch.ops.aten

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def summed(summand: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """a @ b, alone, with a bias (1-D) or with a scaled matrix (2-D) added."""
    if summand.ndim == 0:
        return a @ b
    return torch.addmm(summand if summand.ndim == 1 else 0.9 * summand, a, b)


def forward(summand: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """(batch, columns) and (rows, columns)"""
    return summed(summand, x, weight.t())


def backward(summand: Tensor, grad: Tensor, weight: Tensor) -> Tensor:
    """(batch, rows) and (rows, columns)"""
    return summed(summand, grad, weight)


def gradient(summand: Tensor, grad: Tensor, x: Tensor) -> Tensor:
    """(batch, rows) and (batch, columns)"""
    return summed(summand, grad.t(), x)


def rewritten(product: Product, inputs: tuple[Tensor, ...], threads: int) -> torch.fx.GraphModule:
    """The graph of a product after the pass, with torch set to `threads` threads."""
    graph = trace(product, inputs)
    with on_threads(threads):
        Products()(graph.graph)
    graph.graph.lint()
    graph.recompile()
    return graph


def operations(graph: torch.fx.GraphModule) -> set[object]:
    """The kinds of matrix product in a graph."""
    kinds = {aten.mm, aten.addmm, aten.addmm_, aten.bmm, aten.baddbmm_}
    found = {getattr(node.target, "overloadpacket", None) for node in graph.graph.nodes}
    return found & kinds


def inputs_of(product: Product, batch: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Random factors of a product."""
    shapes: dict[Product, tuple[tuple[int, int], tuple[int, int]]] = {
        forward: ((batch, columns), (rows, columns)),
        backward: ((batch, rows), (rows, columns)),
        gradient: ((batch, rows), (batch, columns)),
    }
    first, second = shapes[product]
    return torch.randn(first), torch.randn(second)


@given(
    st.sampled_from([forward, backward, gradient]),
    st.integers(1, 40),
    st.one_of(st.integers(1, 40), st.sampled_from([32, 64, 96, 128])),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_rewritten_products_have_the_same_results_for_all_shapes_and_threads(
    product: Product, batch: int, rows: int, columns: int, threads: int, ndim: int
) -> None:
    torch.manual_seed(0)
    factors = inputs_of(product, batch, rows, columns)
    shape = product(torch.zeros(()), *factors).shape
    inputs = (torch.randn(shape[2 - ndim :]), *factors)
    found = rewritten(product, inputs, threads)(*inputs)
    torch.testing.assert_close(found, product(*inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("product", [forward, backward, gradient])
@pytest.mark.parametrize(
    ("threads", "batch", "rows", "expected"),
    [
        (2, 64, 128, {aten.bmm}),
        (4, 64, 128, {aten.bmm}),
        (1, 64, 128, {aten.mm}),
        (2, 4096, 128, {aten.mm}),
        (2, 64, 120, {aten.mm}),
    ],
)
def test_rows_are_split_by_thread_if_they_divide_evenly_and_the_batch_is_small(
    product: Product, threads: int, batch: int, rows: int, expected: set[object]
) -> None:
    inputs = (torch.zeros(()), *inputs_of(product, batch, rows, 100))
    assert operations(rewritten(product, inputs, threads)) == expected


@pytest.mark.parametrize(("threads", "expected"), [(1, aten.addmm_), (2, aten.baddbmm_)])
def test_a_gradient_is_accumulated_into_the_momentum_buffer(threads: int, expected: object) -> None:
    inputs = (torch.zeros(128, 100), *inputs_of(gradient, 64, 128, 100))
    assert operations(rewritten(gradient, inputs, threads)) == {expected}


def test_float64_products_are_not_rewritten() -> None:
    inputs = (torch.zeros(()).double(), *(t.double() for t in inputs_of(forward, 64, 128, 100)))
    assert operations(rewritten(forward, inputs, 2)) == {aten.mm}


@pytest.mark.parametrize(("rows", "expected"), [(10, (10, 64)), (16, (64, 16))])
def test_a_result_of_few_columns_is_computed_as_few_rows(
    rows: int, expected: tuple[int, int]
) -> None:
    graph = rewritten(forward, (torch.zeros(()), *inputs_of(forward, 64, rows, 100)), 1)
    [product] = graph.graph.find_nodes(op="call_function", target=aten.mm.default)
    assert product.meta["val"].shape == expected
