"""``losses_of``: a submodule returns a dict of losses, and somebody else's step adds them up."""

import copy
import pickle
from collections import OrderedDict
from enum import Enum

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_gradnorm import GeometricLoss, GradNorm, GradNormCallback, LossBalancingCallback
from lightning_gradnorm.session import BalancingSession
from tests.callbacks.library import same
from tests.helpers import Recorder, TrunkAndHeads, batches, quiet_trainer


class Detector(nn.Module):
    """Returns losses where it trains, and predictions where it does not."""

    def __init__(self, **extra):
        super().__init__()
        inner = TrunkAndHeads()
        self.trunk, self.heads, self.scales, self.extra = inner.trunk, inner.heads, inner.scales, extra

    features, losses, reduced = TrunkAndHeads.features, TrunkAndHeads.losses, TrunkAndHeads.reduced

    def forward(self, x):
        if not self.training:
            return [{"boxes": x}]
        losses = self.losses(x)
        return losses | {name: make(losses) for name, make in self.extra.items()}


class Vendor(L.LightningModule):
    def __init__(self, **extra):
        super().__init__()
        self.model = Detector(**extra)

    def training_step(self, batch, batch_idx):
        return sum(loss for loss in self.model(batch[0]).values() if isinstance(loss, Tensor))

    def validation_step(self, batch, batch_idx):
        assert self.model(batch[0]) == [{"boxes": batch[0]}]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fit(folder, make, callback, **settings):
    torch.manual_seed(0)
    recorder = Recorder(callback)
    module = make()
    quiet_trainer(folder, callbacks=[callback, recorder], **settings).fit(module, batches(6), batches(1))
    return recorder, module


@pytest.mark.feature(
    "a submodule that returns a dict of losses",
    "supported",
    "`losses_of='its name'`; torchvision's detectors; equal to the mixin",
)
@pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`")
@pytest.mark.parametrize("make", [lambda: GradNorm(lr=0.1), GeometricLoss], ids=["gradnorm", "geometric"])
def test_a_dict_of_losses_is_weighed_on_its_way_out(tmp_path, make):
    found, module = fit(tmp_path, Vendor, LossBalancingCallback(make(), losses_of="model", summary=False))
    expected, _ = fit(tmp_path, TrunkAndHeads, LossBalancingCallback(make(), summary=False))
    assert same(found, expected)
    assert max(abs(weight - 1) for weight in found.weights[-1].values()) > 0.1
    assert not module.model._forward_hooks, "nothing is left behind"


def test_what_is_no_loss_goes_through(tmp_path):
    extra = {"count": lambda losses: 3, "seen": lambda losses: torch.zeros(()), "map": lambda losses: losses["small"].expand(2)}

    class Sums(Vendor):
        def training_step(self, batch, batch_idx):
            output = self.model(batch[0])
            assert type(output) is dict
            assert output["count"] == 3
            assert output["map"].shape == (2,)
            return sum(output[task] for task in self.model.scales)

    found, _ = fit(tmp_path, lambda: Sums(**extra), GradNormCallback(lr=0.1, losses_of="model", summary=False))
    expected, _ = fit(tmp_path, Vendor, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    assert same(found, expected)


class Output(OrderedDict):
    """As transformers' outputs: entries are attributes too."""

    def __setitem__(self, name, value):
        super().__setitem__(name, value)
        super().__setattr__(name, value)


def test_an_output_of_another_kind_stays_of_that_kind():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.trunk, self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, x):
            z = self.trunk(x).tanh()
            return Output(a=self.a(z).square().mean(), b=10 * self.b(z).mean().square())

    network = nn.ModuleDict({"inner": Model()})
    session = BalancingSession(GradNorm(lr=0.5), network, losses_of="inner")
    for _ in range(3):
        output = network["inner"](torch.ones(5, 3))
        assert isinstance(output, Output)
        assert output.a is output["a"]
        total = output.a + output.b
        session.before_backward(total)
        total.backward()
        session.after_backward()
        session.step()
    assert set(session.balancer.weights) == {"a", "b"}
    assert session.balancer.weights["a"] != 1
    session.close()
    assert not network["inner"]._forward_hooks


def test_a_sum_among_the_losses_is_refused(tmp_path):
    def total(losses):
        return losses["small"] + losses["large"]

    callback = GradNormCallback(losses_of="model", summary=False)
    with pytest.raises(RuntimeError, match=r"'loss' is made of ('small', 'large'|'large', 'small'), so it is their sum"):
        fit(tmp_path, lambda: Vendor(loss=total), callback)


@pytest.mark.parametrize("name", ["modle", "", "model.trunk.weight"])
def test_an_unknown_name_is_refused_with_what_there_is(tmp_path, name):
    with pytest.raises(ValueError, match=rf"losses_of='{name}' names no submodule of Vendor.*there are: model\."):
        fit(tmp_path, Vendor, GradNormCallback(losses_of=name, summary=False))
    with pytest.raises(ValueError, match="losses_of is the dotted name of a submodule; got 3"):
        GradNormCallback(losses_of=3)


def test_a_submodule_that_returns_no_losses_is_told(tmp_path):
    with pytest.raises(RuntimeError, match=r"never called total_loss\(\).*losses_of='its name'"):
        fit(tmp_path, Vendor, GradNormCallback(losses_of="model.trunk", summary=False))


def test_two_forward_passes_in_one_step_are_refused(tmp_path):
    class Twice(Vendor):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch, batch_idx) + super().training_step(batch, batch_idx)

    with pytest.raises(RuntimeError, match=r"submodule that losses_of names returned losses of .* twice in one step"):
        fit(tmp_path, Twice, GradNormCallback(losses_of="model", summary=False))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler warns of itself
def test_a_compiled_submodule_goes_by_its_name(tmp_path):
    def compiled():
        module = Vendor()
        module.model = torch.compile(module.model, backend="eager")
        return module

    found, _ = fit(tmp_path, compiled, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    expected, _ = fit(tmp_path, Vendor, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    assert found.weights[-1] == pytest.approx(expected.weights[-1], rel=1e-5)


Kind = Enum("Kind", ["small", "middle", "large", "odd"])


@pytest.mark.parametrize(
    ("key", "task"),
    [
        (list(Kind.__members__).index, lambda name: str(list(Kind.__members__).index(name))),
        (lambda name: Kind[name], lambda name: f"Kind.{name}"),
        (type("Text", (str,), {"__str__": lambda self: "other"}), lambda name: name),
    ],
    ids=["int", "enum", "text"],
)
def test_keys_of_any_kind_stay_as_they_are(tmp_path, key, task):
    class Keyed(Detector):
        def forward(self, x):
            output = super().forward(x)
            return {key(name): loss for name, loss in output.items()} if self.training else output

    class Sums(Vendor):
        def __init__(self):
            super().__init__()
            self.model.__class__ = Keyed

    found, _ = fit(tmp_path, Sums, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    expected, _ = fit(tmp_path, Vendor, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    expected.weights = [{task(name): weight for name, weight in weights.items()} for weights in expected.weights]
    assert same(found, expected)


def test_a_loss_with_one_entry_keeps_its_shape(tmp_path):
    class Rows(Vendor):
        def training_step(self, batch, batch_idx):
            return torch.cat(list(self.model(batch[0]).values())).sum()

    class Entries(Detector):
        def losses(self, x):
            return {task: loss.reshape(1) for task, loss in super().losses(x).items()}

    def make():
        module = Rows()
        module.model.__class__ = Entries
        return module

    found, _ = fit(tmp_path, make, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    expected, _ = fit(tmp_path, Vendor, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    assert found.weights[-1] == pytest.approx(expected.weights[-1], rel=1e-5)


def test_a_checkpointed_submodule_returns_its_losses_once(tmp_path):
    class Checkpointed(Vendor):
        def training_step(self, batch, batch_idx):
            return checkpoint(lambda x: sum(self.model(x).values()), batch[0], use_reentrant=False)

    found, _ = fit(tmp_path, Checkpointed, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    expected, _ = fit(tmp_path, Vendor, GradNormCallback(lr=0.1, losses_of="model", summary=False))
    assert same(found, expected)


def test_a_copy_made_in_training_is_weighed_by_nobody():
    module = Vendor()
    BalancingSession(GradNorm(), module, losses_of="model")
    x = torch.randn(8, 6)
    plain = module.model.losses(x)
    for again in (copy.deepcopy(module.model), pickle.loads(pickle.dumps(module.model))):
        assert all(loss.grad_fn.name() == plain[task].grad_fn.name() for task, loss in again(x).items())
    session = BalancingSession(GradNorm(), copy.deepcopy(module), losses_of="model")
    assert session.totals == 0
