"""The graph of weights: each node is met once, and what lies above what."""

import torch
from torch import nn

from lightning_gradnorm.shared_layer import detect_shared_layer
from lightning_gradnorm.shared_layer.layer import weight_names
from lightning_gradnorm.shared_layer.weight_graph import WeightGraph
from tests.test_shared_layer_search import Network


def test_a_graph_of_many_nodes_is_walked_twice(monkeypatch):
    """Each node's children are asked for once, however many weights, tasks and candidates there are."""
    net = nn.Module()
    net.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(400))
    net.heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(5))
    z = torch.randn(3, 4)
    for layer in net.layers:
        z = z + layer(z).tanh()
    p = torch.cat([head(z) for head in net.heads], 1)
    losses = {f"task{i}": p[:, i].square().mean() for i in range(5)}
    from lightning_gradnorm.shared_layer import weight_graph

    seen, walks, children_first, flow = [], [], weight_graph.children_first, WeightGraph._flow
    monkeypatch.setattr(
        weight_graph, "children_first", lambda roots, met: (seen.append(step[0]) or step for step in children_first(roots, met))
    )
    monkeypatch.setattr(WeightGraph, "_flow", lambda self, only: walks.append(1) or flow(self, only))
    assert detect_shared_layer(losses, net).names == ("layers.399.weight",)
    assert len(seen) == len(set(seen)) > 2000
    assert len(walks) <= 2


def test_weights_are_numbered_by_their_first_use_and_know_what_lies_above():
    net = Network()
    graph = WeightGraph(net.losses("ac"), weight_names(net))
    order = [name for name in graph.names if name.endswith("weight")]
    assert order == ["trunk.0.weight", "trunk.2.weight", "decoder.weight", "heads.a.weight", "heads.c.weight"]
    above = {
        name: {a for a, there in zip(graph.names, graph.above[:, i], strict=True) if there and a in order}
        for i, name in enumerate(graph.names)
    }
    assert above["trunk.0.weight"] == set(order[1:])
    assert above["trunk.2.weight"] == set(order[2:])
    assert above["decoder.weight"] == {"heads.a.weight"}
    assert above["heads.a.weight"] == above["heads.c.weight"] == set()


def test_of_weights_that_lie_above_each_other_in_a_circle_the_one_first_used_last_is_the_last():
    net = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
    x, losses = torch.randn(3, 4), {}
    for i in range(3):
        one, other, third = (net[(i + k) % 3] for k in range(3))
        losses[f"task{i}"] = (one(other(x).tanh()) + third(x)).square().mean()
    graph = WeightGraph(losses, {layer.weight: f"{i}" for i, layer in enumerate(net)})
    last = graph.last_of(torch.ones(3, dtype=torch.bool))
    assert last.tolist() == [False, False, True]
    assert not graph.last_of(torch.zeros(3, dtype=torch.bool)).any()


def test_the_gradient_of_a_large_table_stays_sparse(monkeypatch):
    net = nn.ModuleDict({"words": nn.Embedding(20, 8, sparse=True), "a": nn.Linear(8, 1), "b": nn.Linear(8, 1)})
    z = net["words"](torch.randint(20, (7,)))
    losses = {task: net[task](z).square().mean() for task in "ab"}
    monkeypatch.setattr(torch.Tensor, "to_dense", None)
    assert detect_shared_layer(losses, net).names == ("words.weight",)
