"""Which nodes of a graph are products with a weight of W, whose gradient is better kept as factors: see ``factors``."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor
from torch.autograd.graph import Node

from lightning_gradnorm.factors import WeightFactors
from lightning_gradnorm.gram import part_of_square
from lightning_gradnorm.vector_jacobian import dtype_of, rows_of, shape_of

_WEIGHT = {"MmBackward0": 1, "AddmmBackward0": 2, "ConvolutionBackward0": 1}  # product's node → which operand may be a weight
_TURNS = "TBackward0"
_CASTS = "ToCopyBackward0"
_NORMALISES = {"NativeBatchNormBackward0": "_saved_training", "CudnnBatchNormBackward0": "_saved_training"}  # while training


def find_factors(
    nodes: Iterable[Node],
    leaving: Mapping[Node, Iterable[tuple[int, Node, int, int | None, bool]]],
    targets: Mapping[tuple[Node, int], int],
    wanted: Sequence[Any],
    tasks: int,
    keep: bool = True,
    pairs: bool = False,
) -> tuple[dict[Node, tuple[int, WeightFactors]], dict[int, WeightFactors]]:
    """The products whose gradient on a weight of W is better kept as factors.

    A weight qualifies if all that brings gradients to it, of several tasks together, are such products.

    Args:
        nodes: those where several tasks have met.
        leaving: a task's own node → the edges on which its gradient leaves what is its own (see ``autograd_graph.Edge``).
        targets: (node, its input) → number of the tensor of W.
        wanted: the tensors of W.
        tasks: how many.
        keep: whether the factors are to be kept once the norms are had.
        pairs: whether, if not, they are to be kept until the inner products are had.

    Returns:
        Product's node → (which child is the weight, factors); number of the tensor of W → factors.
    """
    nodes = list(nodes)
    products, between = _products(nodes, targets, wanted)
    if not products:
        return {}, {}
    candidates = {product.number for product in products.values()}
    above: dict[Node, list[Node]] = {node: [] for node in products}
    edges = [(node, child, nr) for node in nodes if node not in between for child, nr in _others(node, products)]
    edges += [(node, child, nr) for node, out in leaving.items() for _, child, nr, *_ in out]
    candidates.difference_update(k for out in leaving.values() for _, _, _, k, _ in out)
    for parent, child, number in edges:
        candidates.discard(targets.get((child, number), between.get(child, -1)))  # something else brings a gradient there
        if child in above:
            above[child].append(parent)
    by_weight: dict[int, list[Node]] = {}
    for node, product in products.items():
        if product.number in candidates:
            by_weight.setdefault(product.number, []).append(node)
    chosen = {}
    for k, users in by_weight.items():
        turns = {products[node].turned for node in users}
        if len(turns) == 1 and _gram_is_less(users, wanted[k], tasks):
            normalised = all(_normalises(parent) for node in users for parent in above[node])
            chosen[k] = WeightFactors(tasks, wanted[k], turns.pop(), normalised, len(users), keep, pairs)
    return {node: (p.operand, chosen[p.number]) for node, p in products.items() if p.number in chosen}, chosen


class _Product(NamedTuple):
    operand: int  # which child is the weight
    number: int  # of the weight among the tensors of W
    turned: bool


def _products(
    nodes: Iterable[Node], targets: Mapping[tuple[Node, int], int], wanted: Sequence[Any]
) -> tuple[dict[Node, _Product], dict[Node, int]]:
    """The products with a weight of W among the nodes, and the nodes between the two → number of the weight."""
    products: dict[Node, _Product] = {}
    between: dict[Node, int] = {}
    for node in nodes:
        operand = _WEIGHT.get(type(node).__name__)
        found = None if operand is None else _way_to_weight(node.next_functions[operand], targets)
        if operand is not None and found is not None and isinstance(wanted[found[0]], Tensor) and _is_plain(node):
            number, turned, passed = found
            products[node] = _Product(operand, number, turned or type(node).__name__ == "ConvolutionBackward0")
            between |= dict.fromkeys(passed, number)
    return products, between


def _others(node: Node, products: Mapping[Node, _Product]) -> Iterator[tuple[Node, int]]:
    """The ways down from a node but for the one to a product's weight."""
    own = products[node].operand if node in products else None
    return ((child, nr) for i, (child, nr) in enumerate(node.next_functions) if child is not None and i != own)


def _normalises(node: Node) -> bool:
    """Whether what leaves the node sums to 0 over all rows."""
    setting = _NORMALISES.get(type(node).__name__)
    return setting is not None and bool(getattr(node, setting, False))


def _way_to_weight(
    edge: tuple[Node | None, int], targets: Mapping[tuple[Node, int], int]
) -> tuple[int, bool, list[Node]] | None:
    """From a product's operand to a tensor of W: its number, whether transposed, and the nodes between."""
    node, number = edge
    turned, passed = False, list[Node]()
    while node is not None:
        if (node, number) in targets:
            return targets[node, number], turned, passed
        kind = type(node).__name__
        if kind not in (_TURNS, _CASTS):
            return None
        turned ^= kind == _TURNS
        passed.append(node)
        node, number = node.next_functions[0]
    return None


def _is_plain(node: Any) -> bool:
    """A product of real numbers, unscaled and not transposed."""
    if getattr(node, "_saved_alpha", 1) != 1 or getattr(node, "_saved_transposed", False):
        return False
    return not bool(dtype_of(node).is_complex)


def _gram_is_less(nodes: Sequence[Any], weight: Tensor, tasks: int) -> bool:
    """Whether the norms take fewer operations by the Gram form than by one product per task."""
    first = nodes[0]
    if type(first).__name__ == "ConvolutionBackward0":
        inputs, outputs = weight[0].numel(), weight.shape[0] // int(first._saved_groups)
        rows = sum(math.prod(shape_of(node)) // weight.shape[0] for node in nodes)
    else:
        outputs = shape_of(first)[-1]
        inputs = weight.numel() // max(outputs, 1)
        rows = sum(rows_of(node) for node in nodes)
    return rows * (inputs + tasks * outputs) * part_of_square(rows) < tasks * inputs * outputs
