"""The search for the shared layer: over several batches, without a trace, and where a graph cannot be run twice."""

import pytest
import torch
from torch import nn

from lightning_gradnorm.descent import gradients_of
from lightning_gradnorm.shared_layer import SharedLayer, SharedLayerSearch, detect_shared_layer

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
