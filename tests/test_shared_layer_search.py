"""The search for the shared layer: over several batches, without a trace, and where a graph cannot be run twice."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm.descent import gradients_of
from lightning_gradnorm.shared_layer import SharedLayer, SharedLayerSearch, detect_shared_layer
from lightning_gradnorm.shared_layer.layer import weight_names
from lightning_gradnorm.shared_layer.weight_graph import WeightGraph

TRUNK = ("trunk.2.weight",)


class Network(nn.Module):
    """Tasks a and b share a decoder that c does without; all share the trunk; o shares nothing."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh())
        self.decoder = nn.Linear(8, 8)
        self.heads = nn.ModuleDict({task: nn.Linear(8, 1) for task in "abc"})
        self.odd = nn.Linear(6, 1)

    def losses(self, tasks, together=False):
        x = torch.randn(7, 6)
        z = self.trunk(x)
        features = {"a": self.decoder(z).tanh(), "b": self.decoder(z).tanh(), "c": z}
        if together:
            p = torch.cat([head(features[task]) for task, head in self.heads.items()], 1)
            return {task: p[:, "abc".index(task)].square().mean() for task in tasks}
        losses = {"o": self.odd(x).square().mean()}
        return {task: losses[task] if task in losses else self.heads[task](features[task]).square().mean() for task in tasks}


DECODER = ("decoder.weight",)
# first batches (tasks of each), declared → names after each batch
BATCHES = {
    "together": (["abc"], "", [TRUNK]),
    "two share more": (["ab"], "", [DECODER]),
    "one at first": (["a", "ab"], "", [None, DECODER]),
    "one by one": (["a", "b"], "", [None, DECODER]),
    "one alone": (["a", "a", "a"], "", [None, None, None]),
    "one alone, declared": (["a"], "a", [("heads.a.weight",)]),
    "one more than declared": (["ab"], "a", [DECODER]),
    "declared, late": (["ab", "ab", "c"], "abc", [None, None, TRUNK]),
    "declared, one by one": (["a", "b", "c"], "abc", [None, None, TRUNK]),
    "declared, together at last": (["a", "abc"], "cab", [None, TRUNK]),
    "new one": (["ab", "c"], "", [DECODER, TRUNK]),
    "new one, in company": (["ab", "ac"], "", [DECODER, TRUNK]),
    "the old ones once more": (["ab", "c", "ab"], "", [DECODER, TRUNK, TRUNK]),
}


@pytest.mark.parametrize(("batches", "declared", "names"), BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("together", [False, True], ids=["apart", "cat"])
def test_the_layer_is_one_that_all_tasks_share_which_were_seen_or_declared(batches, declared, names, together):
    net = Network()
    search = SharedLayerSearch(net, tuple(declared))
    for tasks, expected in zip(batches, names, strict=True):
        layer = search.look(net.losses(tasks, together))
        assert (layer and layer.names) == expected, layer and layer.reason


def test_heads_of_tasks_in_different_batches_are_heads():
    """The one wide head has entries of each task, seen one after the other."""
    net = nn.ModuleDict({"trunk": Network().trunk, "head": nn.Linear(8, 2)})
    search = SharedLayerSearch(net)
    for i, expected in enumerate([None, TRUNK]):
        p = net["head"](net["trunk"](torch.randn(7, 6)))
        layer = search.look({"ab"[i]: p[:, i].square().mean()})
        assert (layer and layer.names) == expected


def test_whether_a_batch_fits_is_told_without_a_backward(monkeypatch):
    net = Network()
    layer = SharedLayerSearch(net).look(net.losses("ab"))
    search = SharedLayerSearch(net)
    monkeypatch.setattr("lightning_gradnorm.shared_layer.evidence.gradients_of", None)
    assert search.fits(layer, net.losses("ab"))
    assert search.fits(layer, net.losses("b"))
    assert not search.fits(layer, net.losses("abc"))
    assert not search.fits(layer, net.losses("c"))
    assert not search.fits(layer, {"a": torch.ones((), requires_grad=True).exp()})
    assert search.fits(SharedLayer(("decoder",), (), "its output"), net.losses("c"))


def test_a_look_that_can_bring_nothing_new_costs_nothing(monkeypatch):
    net = Network()
    search = SharedLayerSearch(net, "abc")
    assert search.look(net.losses("ab")) is None
    losses = net.losses("ab")
    monkeypatch.setattr("lightning_gradnorm.shared_layer.evidence.gradients_of", None)
    monkeypatch.setattr("lightning_gradnorm.shared_layer.search.WeightGraph", None)
    assert search.look(losses) is None


def test_of_tasks_that_are_known_no_gradient_is_read_again(monkeypatch):
    net, read = Network(), []
    search = SharedLayerSearch(net, "abc")
    search.look(net.losses("ab"))

    def reading(losses, tensors):
        read.extend(losses.values())
        return gradients_of(losses, tensors)

    monkeypatch.setattr("lightning_gradnorm.shared_layer.evidence.gradients_of", reading)
    losses = net.losses("abc")
    assert search.look(losses).names == TRUNK
    assert read == [losses["c"]]


def test_what_shares_nothing_with_the_tasks_before_is_refused_and_forgotten():
    net = Network()
    search = SharedLayerSearch(net)
    search.look(net.losses("ab"))
    with pytest.raises(
        ValueError, match=r"share no trainable weight(.*\n)+  'a' reaches heads\.a.*\n.*\n  'o' reaches odd\.weight\n"
    ):
        search.look(net.losses("ao"))
    assert search.look(net.losses("ab")).names == DECODER


# -- tasks without a gradient -----------------------------------------------------------------------------------------------


def silence(losses, *tasks):
    return {task: loss * 0 if task in tasks else loss for task, loss in losses.items()}


def test_a_task_without_gradient_has_no_say_and_is_named():
    net = Network()
    search = SharedLayerSearch(net)
    layer = search.look(silence(net.losses("abc", together=True), "c"))
    assert layer.names == DECODER or layer.names == TRUNK
    assert search.silent_tasks == ("c",)
    assert "task 'c' had no gradient so far, and no say" in layer.reason
    layer = search.look(net.losses("abc", together=True))
    assert layer.names == TRUNK
    assert search.silent_tasks == ()
    assert "no say" not in layer.reason


def test_while_one_task_alone_has_a_gradient_the_search_waits_ten_batches():
    net = Network()
    search = SharedLayerSearch(net)
    looks = [search.look(silence(net.losses("ab"), "b")) for _ in range(11)]
    assert looks[:10] == [None] * 10
    assert looks[10].names == DECODER
    search = SharedLayerSearch(net)
    assert search.look(silence(net.losses("ab"), "b")) is None
    assert search.look(net.losses("ab")).names == DECODER


@pytest.mark.parametrize("silent", ["a", "ab", "abc"])
def test_one_look_finds_a_layer_whatever_has_no_gradient(silent):
    net = Network()
    layer = detect_shared_layer(silence(net.losses("abc"), *silent), net)
    assert layer.names == TRUNK
    assert all(f"task {task!r}" in layer.reason for task in silent)


def test_a_head_that_starts_at_zero_is_waited_for():
    net = Network()
    nn.init.zeros_(net.heads["c"].weight)
    search = SharedLayerSearch(net)
    losses = net.losses("bc")
    assert search.look(losses) is None
    sum(losses.values()).backward()
    torch.optim.SGD(net.parameters(), 0.1).step()
    assert search.look(net.losses("bc")).names == TRUNK


# -- the choice explained ---------------------------------------------------------------------------------------------------


REASONS = {
    "nothing passed over": (False, "ab", "the last weight that every task's loss reaches; found from the graph"),
    "heads": (
        True,
        "ab",
        "the last weight on which every task has a gradient; passed over heads.a.weight (no gradient of task 'b'), "
        "heads.b.weight (no gradient of task 'a'), heads.c.weight (no task has a gradient there); found from the graph",
    ),
}


@pytest.mark.parametrize(("together", "tasks", "words"), REASONS.values(), ids=REASONS)
def test_the_reason_tells_what_was_passed_over(together, tasks, words):
    net = Network()
    layer = detect_shared_layer(net.losses(tasks, together), net)
    assert words in layer.reason
    assert "name another by shared_layer" in layer.reason


def test_the_reason_of_a_wide_head_a_set_and_a_prediction_fed_on():
    net = nn.ModuleDict(
        {
            "trunk": Network().trunk,
            "a": nn.Linear(8, 2),
            "b": nn.Linear(10, 1),
            "one": nn.Linear(8, 2),
            "other": nn.Linear(8, 2),
        }
    )
    z = net["trunk"](torch.randn(7, 6))
    p = net["a"](z)
    wide = detect_shared_layer({"a": p[:, 0].sum(), "b": p[:, 1].sum()}, net)
    assert (
        "the last weight on which every task has a gradient; passed over a.weight (each task has entries of its" in wide.reason
    )
    fed = detect_shared_layer({"a": p.square().sum(), "b": net["b"](torch.cat([z, p], 1)).sum()}, net)
    assert fed.names == TRUNK
    assert "passed over a.weight (a head of task 'a', whose output another task takes in)" in fed.reason
    pair = net["one"](z) + net["other"](z)
    both = detect_shared_layer({"a": pair.square().sum(), "b": net["b"](torch.cat([pair] * 5, 1)).sum()}, net)
    assert set(both.names) == {"one.weight", "other.weight"}
    assert both.reason.startswith("the last weights that every task's loss reaches; found from")


def test_where_the_tasks_meet_in_no_entry_that_is_said():
    net = nn.Linear(4, 2)
    y = net(torch.randn(5, 4))
    layer = detect_shared_layer({"a": y[:, 0].sum(), "b": y[:, 1].sum()}, net)
    assert layer.names == ("weight",)
    assert "though their gradients meet in none of its entries" in layer.reason


# -- without a trace --------------------------------------------------------------------------------------------------------


def stateful(run):
    net = Network()
    net.trunk = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), spectral_norm(nn.Linear(8, 8)), nn.Tanh())
    z = run(net.trunk, torch.randn(7, 6))
    return net, {task: net.heads[task](z).square().mean() for task in "abc"}


def kept(trunk, x):
    return checkpoint(trunk, x, use_reentrant=False)


def not_kept(trunk, x):
    return checkpoint(trunk, x, use_reentrant=False, preserve_rng_state=False)


def plain(trunk, x):
    return trunk(x)


@pytest.mark.parametrize("run", [plain, kept, not_kept])
def test_looking_leaves_gradients_buffers_and_random_numbers_as_they_were(run):
    torch.manual_seed(0)
    net, losses = stateful(run)
    net.decoder.weight.grad = torch.ones(8, 8)
    buffers = {name: buffer.clone() for name, buffer in net.named_buffers()}
    same_buffers, random = dict(net.named_buffers()), torch.get_rng_state()
    layer = detect_shared_layer(losses, net)
    assert "trunk.3.parametrizations.weight.original" in layer.names
    assert torch.equal(torch.get_rng_state(), random)
    for name, buffer in net.named_buffers():
        assert buffer is same_buffers[name]
        assert torch.equal(buffer, buffers[name]), name
    assert [name for name, p in net.named_parameters() if p.grad is not None] == ["decoder.weight"]
    assert torch.equal(net.decoder.weight.grad, torch.ones(8, 8))
    sum(losses.values()).backward()  # the graph is still there


class Marked(torch.autograd.Function):
    """A node that Python can watch."""

    @staticmethod
    def forward(ctx, z):
        return z.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient


def test_nothing_stays_of_the_graph_or_on_modules():
    net = Network()
    search = SharedLayerSearch(net)
    losses = {task: Marked.apply(loss) for task, loss in net.losses("abc").items()}
    assert search.look(losses).names == TRUNK
    nodes = [weakref.ref(loss.grad_fn) for loss in losses.values()]
    assert all(node() is not None for node in nodes)
    del losses
    gc.collect()
    assert all(node() is None for node in nodes)
    assert not torch.nn.modules.module._global_forward_pre_hooks


# -- what can be run once only ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_through_a_compiled_region_no_backward_is_run_that_was_not_asked_for():
    torch.compiler.reset()
    torch.manual_seed(0)
    net = Network()
    heads = {task: torch.compile(head, backend="aot_eager") for task, head in net.heads.items()}
    z = net.trunk(torch.randn(7, 6))
    losses = {task: head(z).square().mean() for task, head in heads.items()}
    expected = torch.autograd.grad(
        sum(net.heads[task](z).square().mean() for task in "abc"), net.trunk[2].weight, retain_graph=True
    )
    layer = detect_shared_layer(losses, net)
    assert layer.names == TRUNK
    assert "by the graph alone, part of which can run backward only once" in layer.reason
    sum(losses.values()).backward()
    torch.testing.assert_close(net.trunk[2].weight.grad, expected[0])


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_region_below_the_layer_does_not_hinder():
    torch.compiler.reset()
    net = Network()
    stem = torch.compile(net.trunk[0], backend="aot_eager")
    z = net.trunk[1:](stem(torch.randn(7, 6)))
    p = torch.cat([head(z) for head in net.heads.values()], 1)
    losses = {task: p[:, i].square().mean() for i, task in enumerate("abc")}
    assert detect_shared_layer(losses, net).names == TRUNK
    sum(losses.values()).backward()


def test_a_reentrant_checkpoint_below_the_layer_does_not_hinder():
    net = Network()
    z = net.trunk[2:](checkpoint(net.trunk[1], net.trunk[0](torch.randn(7, 6)), use_reentrant=True))
    p = torch.cat([head(z) for head in net.heads.values()], 1)
    losses = {task: p[:, i].square().mean() for i, task in enumerate("abc")}
    assert detect_shared_layer(losses, net).names == TRUNK


# -- the graph of weights ---------------------------------------------------------------------------------------------------


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
