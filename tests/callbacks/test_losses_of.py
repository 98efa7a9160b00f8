"""``losses_of``: a submodule returns a dict of losses, and somebody else's step adds them up."""

from collections import OrderedDict

import lightning as L
import pytest
import torch
from torch import Tensor, nn

from lightning_gradnorm import GeometricLoss, GradNorm, GradNormCallback, LossBalancingCallback
from lightning_gradnorm.session import BalancingSession
from tests.helpers import Recorder, TrunkAndHeads, batches, quiet_trainer


class Detector(nn.Module):
    """Returns losses where it trains, and predictions where it does not."""

    def __init__(self, **extra):
        super().__init__()
        inner = TrunkAndHeads()
        self.trunk, self.heads, self.scales, self.extra = inner.trunk, inner.heads, inner.scales, extra

    features, losses = TrunkAndHeads.features, TrunkAndHeads.losses

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


def same(found, expected):
    return found.weights == expected.weights and all(map(torch.equal, found.parameters, expected.parameters))


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

    with pytest.raises(RuntimeError, match="twice in one step"):
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
