"""Names of the mixin that stand for something else, in a module or in another base of it."""

import functools
from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import lightning as L
import pytest
import torch
from lightning.pytorch.demos.boring_classes import BoringModel
from torch import nn

from lightning_gradnorm import GradNormCallback, MultiTaskMixin
from tests.callbacks.test_called_or_told import fit
from tests.callbacks.watching import Watch
from tests.helpers import TrunkAndHeads, batches, quiet_trainer


def test_a_module_of_lightnings_own_demos_keeps_its_step(tmp_path):
    class Boring(MultiTaskMixin, BoringModel):
        pass

    quiet_trainer(tmp_path, limit_train_batches=2, limit_val_batches=0).fit(Boring())
    balanced = quiet_trainer(tmp_path, callbacks=[GradNormCallback()], limit_train_batches=2, limit_val_batches=0)
    with pytest.raises(RuntimeError, match="training_step of Boring never called total_loss"):
        balanced.fit(Boring())


class HasStep(L.LightningModule):
    """A vendor's module, which has never heard of the mixin."""

    def __init__(self):
        super().__init__()
        self.lin, self.seen = nn.Linear(6, 1), []

    def training_step(self, batch):
        self.seen.append("vendor")
        return self.lin(batch[0]).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.feature("a `training_step` from another base, after the mixin", "supported", "it is not hidden")
def test_the_mixin_hides_no_training_step_that_another_base_brings(tmp_path):
    class Both(MultiTaskMixin, HasStep):
        pass

    module = Both()
    quiet_trainer(tmp_path).fit(module, batches(2))
    assert module.seen == ["vendor"] * 2
    with pytest.raises(RuntimeError, match="training_step of Both never called total_loss"):
        fit(tmp_path, Both())


def test_a_subclass_of_it_hides_none_either_and_its_task_losses_count(tmp_path):
    class Both(MultiTaskMixin, HasStep):
        pass

    class Further(Both):
        pass

    class Own(Both):
        def task_losses(self, batch, batch_idx):
            self.seen.append("own")
            out = self.lin(batch[0])
            return {"a": out.square().mean(), "b": (out - 1).square().mean()}

    for kind, expected in ((Further, "vendor"), (Own, "own")):
        module = kind()
        quiet_trainer(tmp_path).fit(module, batches(2))
        assert module.seen == [expected] * 2


T = TypeVar("T")


class TwoLevelsUp(HasStep):
    pass


class OfGenericBases(HasStep, Generic[T]):
    pass


class Abstract(L.LightningModule, ABC):
    @abstractmethod
    def training_step(self, batch, batch_idx): ...


class MadeConcrete(HasStep, Abstract):
    pass


class ByProperty(HasStep):
    @property
    def training_step(self):
        return functools.partial(HasStep.training_step, self)


class InPart(HasStep):
    def step(self, batch, who):
        self.seen.append(who)
        return self.lin(batch[0]).square().mean()

    training_step = functools.partialmethod(step, who="vendor")


class ByFunction(HasStep):
    """Its step is put on the object, as libraries do that wrap one."""

    def __init__(self):
        super().__init__()
        self.training_step = functools.partial(HasStep.training_step, self)


VENDORS = [TwoLevelsUp, OfGenericBases, OfGenericBases[int], MadeConcrete, ByProperty, InPart, ByFunction]


def own_losses(self, batch, batch_idx):
    self.seen.append("own")
    return {"a": self.lin(batch[0]).square().mean(), "b": (self.lin(batch[0]) - 1).square().mean()}


@pytest.mark.parametrize("vendor", VENDORS, ids=lambda kind: getattr(kind, "__name__", str(kind)))
@pytest.mark.parametrize("below", [False, True], ids=["at once", "by a subclass of the mixin"])
def test_a_step_is_not_hidden_however_it_is_written(tmp_path, vendor, below):
    class Ours(MultiTaskMixin):
        pass

    class Both(Ours if below else MultiTaskMixin, vendor):
        pass

    module = Both()
    quiet_trainer(tmp_path).fit(module, batches(2))
    assert module.seen == ["vendor"] * 2


@pytest.mark.parametrize("vendor", [vendor for vendor in VENDORS if vendor is not ByFunction], ids=str)
def test_task_losses_of_ones_own_count_before_any_of_these(tmp_path, vendor):
    class Own(MultiTaskMixin, vendor):
        task_losses = own_losses

    module = Own()
    assert fit(tmp_path, module).balancer.steps == len(module.seen)
    assert set(module.seen) == {"own"}


def test_an_abstract_step_is_asked_for_unless_there_are_task_losses(tmp_path):
    class Neither(MultiTaskMixin, Abstract):
        pass

    class Own(MultiTaskMixin, Abstract):
        task_losses, configure_optimizers = own_losses, HasStep.configure_optimizers

        def __init__(self):
            super().__init__()
            self.lin, self.seen = nn.Linear(6, 1), []

    with pytest.raises(TypeError, match=r"abstract.* training_step"):
        Neither()
    assert fit(tmp_path, Own()).balancer.steps == 4


def test_a_vendors_own_task_losses_and_shared_layer_are_not_hidden():
    class WithNames(HasStep):
        def task_losses(self, x):
            return "vendor's"

        def shared_layer(self):
            return self.lin

    class Both(MultiTaskMixin, WithNames):
        pass

    module = Both()
    assert module.task_losses(1) == "vendor's"
    assert module.shared_layer() is module.lin


def shared_layer(self, x):
    return x


@pytest.mark.parametrize(
    "theirs", [3, {"a": 1}, shared_layer, property(lambda self: 3)], ids=["number", "dict", "method", "property"]
)
def test_where_a_vendors_shared_layer_is_something_else_the_callback_names_it(tmp_path, theirs):
    class WithName(HasStep):
        shared_layer = theirs

    class Both(MultiTaskMixin, WithName):
        task_losses = own_losses

    with pytest.raises((TypeError, ValueError), match="shared_layer"):
        fit(tmp_path, Both())
    callback = fit(tmp_path, Both(), GradNormCallback(shared_layer="lin", summary=False))
    assert callback.shared.names == ("lin.weight", "lin.bias")


def test_a_vendors_own_total_loss_is_refused_with_the_way_out():
    class WithTotal(HasStep):
        def total_loss(self, x):
            return x

    with pytest.raises(TypeError, match=r"WithTotal has a total_loss of its own, which MultiTaskMixin would hide.*rename"):

        class Both(MultiTaskMixin, WithTotal):
            pass


KINDS = {
    "module": lambda self: nn.Linear(10, 10),
    "parameter": lambda self: self.trunk[0].weight,
    "name": lambda self: "trunk.0",
    "list": lambda self: [self.trunk[0]],
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stands_under_shared_layer_is_the_answer(tmp_path, kind):
    class Has(TrunkAndHeads):
        def __init__(self):
            super().__init__()
            self.shared_layer = KINDS[kind](self)

        def features(self, x):
            return self.shared_layer(self.trunk(x)) if kind == "module" else self.trunk(x)

    callback, module = Watch(), Has()
    fit(tmp_path, module, callback)
    assert callback.shared.reason == "given by shared_layer()"
    expected = module.shared_layer.weight if kind == "module" else module.trunk[0].weight
    assert any(parameter is expected for parameter in callback.shared.parameters)


def test_a_class_attribute_and_a_property_are_answers_too(tmp_path):
    class Named(TrunkAndHeads):
        shared_layer = "trunk.0"

    class Property(TrunkAndHeads):
        @property
        def shared_layer(self):
            return self.trunk[0]

    for kind in (Named, Property):
        assert fit(tmp_path, kind()).shared.names == ("trunk.0.weight", "trunk.0.bias")


@pytest.mark.parametrize("value", [7, torch.ones(2), {"a": 1}], ids=["number", "tensor", "dict"])
def test_anything_else_under_shared_layer_is_refused(value):
    with pytest.raises(TypeError, match=r"shared_layer is the name by which MultiTaskMixin.*module, a parameter.*another name"):
        TrunkAndHeads().shared_layer = value


@pytest.mark.parametrize("name", ["total_loss", "task_losses"])
@pytest.mark.parametrize("value", [0.0, {}, nn.Linear(2, 2), torch.ones(())], ids=["number", "dict", "module", "tensor"])
def test_an_attribute_in_the_place_of_a_method_is_refused_at_once(name, value):
    with pytest.raises(TypeError, match=f"{name} is a method of MultiTaskMixin.*another name"):
        setattr(TrunkAndHeads(), name, value)


def test_so_it_is_in_the_class_and_below_another_base(tmp_path):
    with pytest.raises(TypeError, match=r"total_loss is a method of MultiTaskMixin.*another name"):

        class Shadowed(TrunkAndHeads):
            total_loss = 0.0

    class Below(HasStep, MultiTaskMixin):
        pass

    module = Below()
    module.total_loss = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"total_loss is a method of MultiTaskMixin.*another name"):
        fit(tmp_path, module)


def test_a_function_put_in_the_place_of_a_method_is_taken():
    module = TrunkAndHeads()
    original, called = module.total_loss, []
    module.total_loss = lambda *args, **kwargs: called.append(1) or original(*args, **kwargs)
    module.training_step([torch.randn(4, 6)], 0)
    assert called == [1]
