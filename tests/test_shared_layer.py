"""What W is: as the user gave it, and as the graph of a first batch shows it."""

import logging
import re

import lightning as L
import pytest
import torch
from lightning_utilities.core import rank_zero
from torch import nn
from torch.nn.utils import weight_norm as old_weight_norm
from torch.nn.utils.parametrizations import spectral_norm, weight_norm
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import GradNormCallback, JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.gradients import UnreachedSharedLayerError
from lightning_gradnorm.shared_layer import feature_modules, resolve_shared_layer, shared_features
from lightning_gradnorm.shared_layer.layer import weight_names
from tests.helpers import TrunkAndHeads, batches, quiet_trainer

NAME_IT = r"Name the layer that all tasks share, by the module's shared_layer\(\) or the callback's shared_layer='its name'"


def mlp() -> nn.Module:
    net = nn.Module()
    net.trunk = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8))
    net.head, net.tied, net.act = nn.Linear(8, 2), nn.Linear(8, 8), nn.Tanh()
    net.tied.weight = net.trunk[2].weight
    net.again = net.head
    return net


# -- given by the user --------------------------------------------------------------------------------------------------

TRUNK = ["trunk.0.weight", "trunk.0.bias", "trunk.2.weight", "trunk.2.bias"]
HEAD = ["head.weight", "head.bias"]
GIVEN = {
    "module": (lambda n: n.head, HEAD),
    "parameter": (lambda n: n.trunk[2].weight, TRUNK[2:3]),
    "bias": (lambda n: n.head.bias, HEAD[1:]),
    "module's name": (lambda n: "trunk", TRUNK),
    "parameter's name": (lambda n: "trunk.0.bias", TRUNK[1:2]),
    "several kinds": (lambda n: ["head.bias", n.trunk[0], "trunk.2"], HEAD[1:] + TRUNK),
    "nested": (lambda n: [["head.bias"], (n.head.weight,)], HEAD[::-1]),
    "generator": (lambda n: n.head.parameters(), HEAD),
    "said thrice": (lambda n: [n.head, "head", n.head.weight], HEAD),
    "tied": (lambda n: [n.trunk[2], n.tied], [*TRUNK[2:], "tied.bias"]),
    "tied parameter's other name": (lambda n: "tied.weight", TRUNK[2:3]),
    "module's other name": (lambda n: "again", HEAD),
}


@pytest.mark.parametrize(("spec", "names"), GIVEN.values(), ids=GIVEN)
def test_the_layer_as_given(spec, names):
    net = mlp()
    shared = resolve_shared_layer(spec(net), net)
    assert list(shared.names) == names
    assert all(p is net.get_parameter(name) for p, name in zip(shared.parameters, shared.names, strict=True))


def test_of_a_partly_frozen_layer_the_trainable_part_is_taken():
    net = mlp()
    net.head.weight.requires_grad_(False)
    assert resolve_shared_layer(net.head, net).names == ("head.bias",)
    assert resolve_shared_layer(["head", net.trunk[0].weight], net).names == ("head.bias", "trunk.0.weight")


def frozen(net: nn.Module) -> nn.Module:
    return net.head.requires_grad_(False)


NOT_GIVEN = {
    "unknown name": (
        lambda n: "heads",
        ValueError,
        r"named 'heads', which is no module or parameter of Module\. Did you mean 'head'.*In it there are: trunk, head",
    ),
    "unknown among others": (
        lambda n: ["head", "trunk.2.wieght"],
        ValueError,
        r"named 'trunk\.2\.wieght'.* Did you mean 'trunk\.2\.weight'.*In 'trunk\.2' there are: weight, bias\.",
    ),
    "the end of a name": (lambda n: "2.bias", ValueError, r"Did you mean 'trunk\.2\.bias'\? In it there are: trunk, head"),
    "below a parameter": (lambda n: "head.bias.1", ValueError, r"In 'head' there are: weight, bias\."),
    "a module that holds nothing": (lambda n: "act.0", ValueError, r"In 'act' there are: no modules or parameters\."),
    "frozen": (frozen, ValueError, rf"is frozen: .*\(head\.weight, head\.bias\) requires.*{NAME_IT}.*unfreeze it"),
    "another network's": (lambda n: nn.Linear(4, 4), ValueError, rf"not one of Module's own \(Linear\)\. {NAME_IT}: not a"),
    "one of another's": (lambda n: [n.head, nn.Parameter(torch.ones(2))], ValueError, "not one of Module's own"),
    "no parameters": (lambda n: n.act, ValueError, rf"gave no parameters \(Tanh\)\. {NAME_IT}: one with weights"),
    "empty list": (lambda n: [], ValueError, r"gave no parameters \(an empty list\)"),
    "plain tensor": (lambda n: n.head.weight.detach(), TypeError, r"tensor of shape \(2, 8\) that is no parameter\. It re"),
    "plain tensor in a list": (lambda n: [n.head, torch.ones(3)], TypeError, r"a tensor of shape \(3,\) that is no parameter"),
    "number": (lambda n: 2, TypeError, r"shared_layer\(\) gave int\. It returns a module, a parameter, the dotted name"),
    "None in a list": (lambda n: [None], TypeError, "gave NoneType.*or None to have the layer found"),
}


@pytest.mark.parametrize(("spec", "error", "words"), NOT_GIVEN.values(), ids=NOT_GIVEN)
def test_what_is_no_layer_of_the_network_is_refused(spec, error, words):
    net = mlp()
    with pytest.raises(error, match=words):
        resolve_shared_layer(spec(net), net)


@pytest.mark.parametrize(("spec", "error", "words"), NOT_GIVEN.values(), ids=NOT_GIVEN)
def test_what_is_no_layer_has_no_features_either(spec, error, words):
    """``norm_of="features"`` refuses the same, but for a module with nothing to train: its output has a gradient."""
    net = mlp()
    given = spec(net)
    if given is net.act or spec is frozen:
        assert feature_modules(given, net) == [given]
        return
    with pytest.raises(error, match=words):
        feature_modules(given, net)


def test_the_choice_as_text_tells_names_shapes_and_size():
    net = mlp()
    assert str(resolve_shared_layer("head.weight", net)) == "head.weight (2, 8): 16 entries, given by shared_layer()"
    every = str(resolve_shared_layer(net, net))
    assert "trunk.2.bias (8,) and 3 more: 138 entries" in every


def weight_normed(wrap):
    net = mlp()
    wrap(net.trunk[2])
    return net


PARTS = {
    "new": (weight_norm, [f"trunk.2.parametrizations.weight.original{i}" for i in (0, 1)]),
    "old": (old_weight_norm, ["trunk.2.weight_g", "trunk.2.weight_v"]),
    "spectral": (spectral_norm, ["trunk.2.parametrizations.weight.original"]),
}


@pytest.mark.parametrize(("wrap", "parts"), PARTS.values(), ids=PARTS)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_parametrised_weight_is_given_by_its_module_or_its_name(wrap, parts):
    net = weight_normed(wrap)
    assert set(resolve_shared_layer(net.trunk[2], net).names) == {*parts, "trunk.2.bias"}
    assert resolve_shared_layer("trunk.2.weight", net).names == tuple(parts)
    assert feature_modules("trunk.2", net) == [net.trunk[2]]
    with pytest.raises(TypeError, match=r"A parametrised weight is computed: give its module or its name"):
        resolve_shared_layer(net.trunk[2].weight, net)
    net.trunk[2].requires_grad_(False)
    for spec in (net.trunk[2], "trunk.2.weight"):
        with pytest.raises(
            ValueError, match=rf"The shared layer is frozen: .*{re.escape(parts[-1])}.* requires grad.*unfreeze it"
        ):
            resolve_shared_layer(spec, net)


def test_two_matrices_that_are_called_like_the_parts_of_one_weight_are_two():
    net = nn.Module()
    net.w_g, net.w_v = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.randn(8, 8))
    assert list(weight_names(net).values()) == ["w_g", "w_v"]


def test_messages_name_who_gave_the_layer():
    net = mlp()
    assert (
        resolve_shared_layer("head", net, "GradNormCallback(shared_layer=…)").reason
        == "given by GradNormCallback(shared_layer=…)"
    )
    assert shared_features("head", net, "the callback").reason == "given by the callback"
    with pytest.raises(ValueError, match=r"^the callback named 'heads', which is no"):
        resolve_shared_layer("heads", net, "the callback")
    with pytest.raises(ValueError, match="the callback names no layer"):
        feature_modules(None, net, "the callback")


# -- what a graph has to have, through both engines and the Trainer ------------------------------------------------------


@pytest.mark.parametrize("engine", [JointBackward, PerTaskBackward])
def test_a_task_that_does_not_reach_the_layer_is_named(engine):
    net = mlp()
    z = net.trunk(torch.randn(5, 4))
    losses = {"on it": net.head(z).sum(), "beside": z.sum(), "alone": net.trunk[0].weight.sum(), "too": net.head(z).mean()}
    losses = tap_losses(losses)
    with pytest.raises(UnreachedSharedLayerError, match="task 'beside', task 'alone' does not reach the shared layer") as e:
        engine(sum(losses.values()), losses, net.head.parameters())
    assert e.value.tasks == ("beside", "alone")
    assert not any(task in str(e.value) for task in ("'on it'", "'too'"))


class Given(TrunkAndHeads):
    """As the user overrides it; the task ``odd`` leaves the trunk after its first layer."""

    def __init__(self, spec="trunk.2.weight", runs_in=None):
        super().__init__()
        self.spec, self.runs_in = spec, runs_in

    def shared_layer(self):
        return self.spec

    def losses(self, x):
        first = self.trunk[:2](x.requires_grad_(True))
        z = self.trunk[2:](first) if self.runs_in is None else self.runs_in(self.trunk[2:], first)
        losses = {task: head(z).pow(2).mean() for task, head in self.heads.items()}
        if self.runs_in is None:
            losses["odd"] = self.heads["odd"](first).pow(2).mean()
        return losses


@pytest.mark.parametrize("engine", ["joint", "per_task", "auto"])
def test_the_trainer_stops_on_a_task_that_does_not_reach_the_layer(tmp_path, engine):
    callback = GradNormCallback(engine=engine)
    with pytest.raises(UnreachedSharedLayerError, match="The loss of task 'odd' does not reach the shared layer"):
        quiet_trainer(tmp_path, callbacks=[callback]).fit(Given(), batches(2))
    assert callback.weights == {}


def plainly(block, x):
    return block(x)


def reentrant(block, x):
    return checkpoint(block, x, use_reentrant=True)


@pytest.mark.parametrize("engine", ["joint", "per_task", "auto"])
@pytest.mark.parametrize("spec", ["trunk.2.weight", "trunk.0.weight", None], ids=["over W", "above W", "above the W found"])
def test_a_reentrant_checkpoint_is_refused_with_the_way_out(tmp_path, engine, spec):
    trainer = quiet_trainer(tmp_path, callbacks=[GradNormCallback(engine=engine)])
    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        trainer.fit(Given(spec, reentrant), batches(2))


@pytest.mark.parametrize("engine", [JointBackward, PerTaskBackward])
def test_a_second_use_of_the_layer_that_a_reentrant_checkpoint_hides_is_refused_too(engine):
    """W is reached outside the checkpoints, so its gradient would not be missing, but wrong."""
    net = mlp()
    z = net.tied(torch.randn(5, 8, requires_grad=True)).tanh()
    losses = {task: reentrant(lambda t: net.head(net.tied(t)).pow(2).mean(), z) for task in ("a", "b")}
    losses = tap_losses(losses)

    def step():
        root = sum(losses.values())
        reader = engine(root, losses, [net.tied.weight])
        root.backward()
        reader.gradients()

    with pytest.raises((ValueError, RuntimeError), match="use_reentrant=False"):
        step()


@pytest.mark.parametrize("engine", ["joint", "per_task"])
@pytest.mark.parametrize("spec", ["trunk.2", "trunk.2.weight", None])
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*frozen")
def test_while_a_layer_under_the_old_weight_norm_is_frozen_the_weights_wait(tmp_path, engine, spec):
    class Freezing(TrunkAndHeads):
        def __init__(self):
            super().__init__()
            old_weight_norm(self.trunk[2])

        def shared_layer(self):
            return spec

        def on_train_batch_start(self, batch, batch_idx):
            self.trunk[2].requires_grad_(batch_idx < 2)

    callback, weights = GradNormCallback(engine=engine), []

    class Note(L.Callback):
        def on_train_batch_end(self, *args):
            weights.append(tuple(callback.weights.values()))

    quiet_trainer(tmp_path, callbacks=[callback, Note()]).fit(Freezing(), batches(4))
    assert {"trunk.2.weight_g", "trunk.2.weight_v"} <= set(callback.shared.names)
    assert weights[0] != weights[1] == weights[2] == weights[3]


def test_the_way_out_is_one(tmp_path):
    callback = GradNormCallback()
    module = Given(runs_in=lambda block, x: checkpoint(block, x, use_reentrant=False))
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, batches(2))
    assert len(set(callback.weights.values())) > 1


# -- announced ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    """The lines that rank_zero_info was given, whichever Lightning has made its logger last."""
    lines, logger = [], logging.Logger("told")
    logger.addFilter(lambda record: lines.append(record.getMessage()))
    monkeypatch.setattr(rank_zero, "log", logger)
    return lines


SAID = {
    "found": (TrunkAndHeads, "trunk.2.weight (10, 10): 100 entries, the last weight that every task's loss reaches"),
    "given": (lambda: Given("trunk.0", plainly), "trunk.0.weight (10, 6), trunk.0.bias (10,): 70 entries, given by"),
}


@pytest.mark.parametrize(("module", "words"), SAID.values(), ids=SAID)
def test_the_choice_is_said_once_with_its_size(tmp_path, told, module, words):
    callback = GradNormCallback()
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(module(), batches(3))
    said = [line for line in told if "entries" in line]
    assert len(said) == 1
    assert all(part in said[0] for part in (words, "shared_layer", "GradNormCallback", "'joint'", str(callback.shared)))
