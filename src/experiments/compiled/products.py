"""Matrix products rewritten to cost less: a pass over the graph for torch's inductor.

accumulate_in_place: a momentum buffer becomes momentum * buffer + gradient, and the gradient of a
linear layer's weight is a matrix product. Inductor computes momentum * buffer, copies it into the
result's memory and has addmm accumulate there. The copy is unnecessary if nothing else reads
momentum * buffer. Measured on two cores, a step of the main job: 0.94 of the time at batch 64,
0.90 at 16. Inductor also copies a linear layer's bias to every row for addmm, while the activation
after it could add it for free. Measured on one core: 0.99 of the time at batch 64, 0.96 at 16.

split_rows_by_thread: an optimizer update splits a weight's rows between the threads, a matrix
product splits its result differently, so that half of what two threads need at every step is in
the other's cache. Here each thread multiplies with the rows that it updates. Measured on two
cores: 0.88 of the time at batch 32, 0.93 at 64, 0.96 at 128; 0.74 at 32 and 0.82 at 64 when the
host placed the cores far apart.

transpose_small: MKL takes twice as long for a result of 10 columns as for its transpose. Measured
on one core, a step of the main job: 0.98 of the time at batch 64 and 256.
"""

from typing import Any, cast

import torch
from torch._inductor import ir
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.lowering import register_lowering
from torch.fx import Graph, Node

aten = torch.ops.aten
VECTOR = 16  # floats in a SIMD register


class SumInPlace(ir.ExternKernelOut):
    """addmm or baddbmm that accumulates into the memory of its first input."""

    def should_allocate(self) -> bool:
        """The output reuses the summand's memory."""
        return False

    def codegen(self, wrapper: Any) -> None:
        summand, *factors = cast(list[Any], self.inputs)
        wrapper.codegen_inplace_reuse(summand, self)
        arguments = [self.name, self.name, *(x.codegen_reference() for x in factors), "1L", "1L"]
        kernel = "at::addmm_out" if len(self.get_size()) == 2 else "at::baddbmm_out"
        device = summand.get_device().type
        wrapper.generate_c_shim_extern_kernel_call(kernel, arguments, device)


@register_lowering([aten.addmm_.default, aten.baddbmm_.default], type_promotion_kind=None)
def sum_in_place(summand: Any, a: Any, b: Any) -> Any:
    """The lowering of the addmm_ and baddbmm_ nodes that Products inserts."""
    layout = ir.FixedLayout(summand.get_device(), summand.get_dtype(), summand.get_size())
    memory = ir.ExternKernel.realize_input(summand)
    if isinstance(memory, ir.BaseView):  # a reshape of the same buffer
        memory = ir.TensorBox(memory.unwrap_view())
    inputs = [ir.ExternKernel.require_contiguous(memory)]
    inputs += [ir.ExternKernel.realize_input(factor) for factor in (a, b)]
    return ir.TensorBox.create(SumInPlace(layout, inputs))


class Products(CustomGraphPass):
    """Rewrites a graph's matrix products."""

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=aten.addmm.default):
            accumulate_in_place(graph, node)
        if not torch.backends.mkl.is_available():  # the rest was measured with MKL only
            return
        for target in (aten.mm.default, aten.addmm_.default):
            for node in graph.find_nodes(op="call_function", target=target):
                value = node.meta["val"]
                if value.dtype == torch.float32 and value.device.type == "cpu":
                    with graph.inserting_before(node):
                        result = transpose_small(graph, node) or split_rows_by_thread(graph, node)
                    if result is not None:
                        node.replace_all_uses_with(result)
                        graph.erase_node(node)

    def uuid(self) -> Any:
        """Identifies the pass in inductor's own cache."""
        return get_hash_for_files((__file__,), str(torch.get_num_threads()))


def accumulate_in_place(graph: Graph, node: Node) -> None:
    """Let addmm accumulate into its summand's memory, or add a bias after the product."""
    summand, *factors = cast(list[Node], node.args)
    value, result = summand.meta["val"], node.meta["val"]
    is_temporary = summand.target == aten.mul.Tensor and len(summand.users) == 1
    if node.kwargs:  # alpha or beta
        return
    if is_temporary and value.shape == result.shape:
        node.target = aten.addmm_.default
    elif value.ndim == 1 and value.dtype == torch.float32:  # lower precision would round twice
        with graph.inserting_before(node):
            product = call(graph, aten.mm.default, *factors)
        node.target, node.args = aten.add.Tensor, (product, summand)


def transpose_small(graph: Graph, node: Node) -> Node | None:
    """a @ b as (b.T @ a.T).T if b is a transposed weight of few rows; None if it is not."""
    *summand, a, b = cast(list[Node], node.args)
    right = b.meta["val"]
    if summand or right.stride(1) == 1 or right.shape[1] >= VECTOR:
        return None
    a, b = (call(graph, aten.permute.default, x, [1, 0]) for x in (a, b))
    return call(graph, aten.permute.default, call(graph, aten.mm.default, b, a), [1, 0])


def split_rows_by_thread(graph: Graph, node: Node) -> Node | None:
    """A product as a batched product with one entry per thread, each with its rows of the weight;
    None if that cannot be done or does not pay.

    The product is a linear layer's forward, x @ weight.T, with x float32 (batch, columns) and
    weight (rows, columns), or one of its gradients, grad @ weight and grad.T @ x. The strides tell
    which one: the transposed factor is not contiguous.
    """
    *summand, a, b = cast(list[Node], node.args)
    (m, k), n = a.meta["val"].shape, b.meta["val"].shape[1]
    for_weight, forward = (x.meta["val"].stride(1) != 1 for x in (a, b))
    if for_weight:
        rows, columns, batch = m, n, k
    elif forward:
        rows, columns, batch = n, k, m
    else:
        rows, columns, batch = k, n, m
    threads = torch.get_num_threads()
    # measured: no gain where the activations are much larger than the weight
    large = batch * (rows + columns) > 4 * rows * columns
    if threads == 1 or large or rows % (threads * VECTOR) != 0 or (summand and not for_weight):
        return None
    share = rows // threads
    if for_weight:
        a = call(graph, aten.view.default, a, [threads, share, batch])
        b = call(graph, aten.expand.default, b, [threads, batch, columns])
        if summand:
            memory = call(graph, aten.view.default, *summand, [threads, share, columns])
            parts = call(graph, aten.baddbmm_.default, memory, a, b)
        else:
            parts = call(graph, aten.bmm.default, a, b)
        return call(graph, aten.view.default, parts, [rows, columns])
    if forward:
        a = call(graph, aten.expand.default, a, [threads, batch, columns])
        b = call(graph, aten.view.default, b, [columns, threads, share])
        b = call(graph, aten.permute.default, b, [1, 0, 2])
        parts = call(graph, aten.bmm.default, a, b)
        parts = call(graph, aten.permute.default, parts, [1, 0, 2])
        return call(graph, aten.reshape.default, parts, [batch, rows])
    a = call(graph, aten.view.default, a, [batch, threads, share])
    a = call(graph, aten.permute.default, a, [1, 0, 2])
    b = call(graph, aten.view.default, b, [threads, share, columns])
    parts = call(graph, aten.bmm.default, a, b)
    return call(graph, aten.sum.dim_IntList, parts, [0])


def call(graph: Graph, target: Any, *args: Any) -> Node:
    """Insert an operation, with the fake tensor of its result in `meta`."""
    node = graph.call_function(target, args)
    node.meta["val"] = target(*torch.fx.map_arg(args, lambda argument: argument.meta["val"]))
    return node
