"""What other people's code hands to ``total_loss``, and what it does with the total: the run is that of plain losses."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from lightning_gradnorm import GradNormCallback, total_loss
from tests.callbacks.test_door import Foreign
from tests.helpers import Labelled, Recorder, batches, quiet_trainer

pytestmark = pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`")


class Vendor(Foreign):
    """Makes something of each loss, and of the total."""

    form = staticmethod(lambda loss: loss)
    after = staticmethod(lambda total, module: total)

    def __init__(self, lr=0.01):
        super().__init__()
        self.lr = lr

    def training_step(self, batch, batch_idx):
        total = total_loss({task: type(self).form(loss) for task, loss in self.losses(batch[0]).items()})
        return type(self).after(total, self)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr)


def fit(folder, make, **settings):
    torch.manual_seed(0)
    callback = GradNormCallback(lr=0.1, summary=False)
    recorder = Recorder(callback)
    quiet_trainer(folder, callbacks=[callback, recorder], **settings).fit(make(), batches(6))
    return recorder


def assert_same_run(found, expected, **tolerance):
    for mine, its in zip(found.weights, expected.weights, strict=True):
        assert mine == pytest.approx(its, rel=tolerance.get("rtol", 0), abs=0)
    for mine, its in zip(found.parameters, expected.parameters, strict=True):
        torch.testing.assert_close(mine, its, **(tolerance or {"rtol": 0, "atol": 0}))
    assert max(abs(weight - 1) for weight in found.weights[-1].values()) > 0.1


# -- the losses ----------------------------------------------------------------------------------------------------------


class Unwrapped(torch.Tensor):
    """Its operations give plain tensors, as those of torchvision's tv_tensors do."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


class Fused(torch.autograd.Function):
    """Has its gradient since the forward, and can be differentiated once."""

    @staticmethod
    def forward(ctx, loss):
        ctx.save_for_backward(torch.ones_like(loss))
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        return ctx.saved_tensors[0].mul_(gradient)


FORMS = {
    "a subclass that loses its attributes": lambda loss: loss.as_subclass(Labelled),
    "a subclass that unwraps itself": lambda loss: loss.as_subclass(Unwrapped),
    "one entry": lambda loss: loss.reshape(1),
    "an entry": lambda loss: loss.expand(1, 1)[0, 0],
    "one of several in place": lambda loss: torch.zeros(3).index_put((torch.tensor(1),), loss).unbind()[1],
    "a fused function": Fused.apply,
    "times a derivative": lambda loss: loss * grad(lambda t: t.clone())(loss.detach()),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.feature(
    "losses as Tensor subclasses, views, one entry, of custom functions and of `torch.func`", "supported", "equal to plain ones"
)
def test_a_loss_of_any_form_is_weighed_as_the_plain_one(tmp_path, form):
    found = fit(tmp_path, type("Formed", (Vendor,), {"form": staticmethod(form)}))
    assert_same_run(found, fit(tmp_path, Vendor))


@pytest.mark.parametrize("zero", [0, 0.0, torch.zeros(()), torch.zeros(1)], ids=repr)
def test_a_term_that_is_switched_off_is_a_term_left_out(tmp_path, zero):
    class Off(Vendor):
        def losses(self, x):
            return super().losses(x) | {"off": zero}

    assert_same_run(fit(tmp_path, Off), fit(tmp_path, Vendor))


class Mixed(Vendor):
    """A loss in double precision, one in half."""

    def losses(self, x):
        losses = super().losses(x)
        return losses | {"small": losses["small"].double(), "odd": losses["odd"].bfloat16()}


@pytest.mark.parametrize("precision", ["32-true", "64-true", "bf16-mixed"])
def test_losses_of_several_precisions_are_weighed_as_of_one(tmp_path, precision):
    found, expected = fit(tmp_path, Mixed, precision=precision), fit(tmp_path, Vendor, precision=precision)
    assert_same_run(found, expected, rtol=1e-2, atol=5e-3)


class Called(Vendor):
    """Its layers are functions of given parameters."""

    def features(self, x):
        return functional_call(self.trunk, dict(self.trunk.named_parameters()), (x,))


class PerSample(Vendor):
    """Its layers see one sample at a time."""

    def features(self, x):
        return vmap(self.trunk)(x)


@pytest.mark.parametrize("kind", [Called, PerSample])
def test_a_network_called_by_torch_func_is_weighed_as_one_that_is_called(tmp_path, kind):
    assert_same_run(fit(tmp_path, kind), fit(tmp_path, Vendor), rtol=1e-5, atol=1e-6)


class Equation(Vendor):
    """A term is a derivative of the network's output."""

    def losses(self, x):
        u = nn.Sequential(self.trunk, self.heads["large"])
        return {"data": (u(x) - x[:, :2]).square().mean(), "equation": 100 * (self.slope(u, x) - 1).square().mean()}

    @staticmethod
    def slope(u, x):
        x = x.requires_grad_()
        return torch.autograd.grad(u(x).sum(), x, create_graph=True)[0]


class FunctionalEquation(Equation):
    @staticmethod
    def slope(u, x):
        return vmap(grad(lambda point: u(point).sum()))(x)


def test_derivatives_by_torch_func_are_those_by_autograd(tmp_path):
    assert_same_run(fit(tmp_path, FunctionalEquation), fit(tmp_path, Equation), rtol=1e-5, atol=1e-6)


# -- the total -----------------------------------------------------------------------------------------------------------

AFTER = {
    "divided": lambda total, module: total / 4,
    "scaled by a tensor": lambda total, module: total * torch.tensor(0.25),
    "in a mean": lambda total, module: torch.stack([total, *torch.zeros(3)]).mean(),
    "in a dict": lambda total, module: {"loss": total.reshape(1) / 4, "of the vendor": 1},
}


@pytest.mark.parametrize("after", AFTER.values(), ids=AFTER)
def test_a_total_that_is_scaled_is_measured_as_it_was(tmp_path, after):
    found = fit(tmp_path, lambda: type("Scaled", (Vendor,), {"after": staticmethod(after)})(lr=0.04))
    assert_same_run(found, fit(tmp_path, Vendor), rtol=1e-6, atol=1e-6)


class Penalised(Vendor):
    """A regulariser beside the total: the size of the features and of a weight."""

    @staticmethod
    def after(total, module):
        return total + 3 * module.kept.square().mean() + 0.1 * module.trunk[0].weight.square().sum()

    def features(self, x):
        self.kept = super().features(x)
        return self.kept


def test_a_regulariser_beside_the_total_trains_and_is_no_task(tmp_path):
    """With no step of the network the weights are those without it; the first step of the network is its own."""
    still = fit(tmp_path, lambda: Penalised(lr=0.0))
    assert_same_run(still, fit(tmp_path, lambda: Vendor(lr=0.0)))
    found, plain = (fit(tmp_path, kind).parameters[0] for kind in (Penalised, Vendor))
    assert list(still.weights[-1]) == ["small", "middle", "large", "odd"]
    torch.manual_seed(0)
    module = Penalised()
    x = next(iter(batches(6)))[0]
    module.losses(x)
    penalty = module.after(0.0, module)
    step = torch.cat(
        [
            torch.zeros(p.numel()) if g is None else g.flatten()
            for p, g in zip(
                module.parameters(), torch.autograd.grad(penalty, list(module.parameters()), allow_unused=True), strict=True
            )
        ]
    )
    torch.testing.assert_close(found - plain, -0.01 * step, rtol=1e-4, atol=1e-7)


class MeanOfTotals(Vendor):
    """Adds its terms up in two places, and steps on the mean of both."""

    def __init__(self):
        super().__init__(lr=0.02)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        totals = [total_loss({task: losses[task] for task in part}) for part in (("small", "middle"), ("large", "odd"))]
        self.optimizers().zero_grad()
        self.manual_backward(torch.stack(totals).mean())
        self.optimizers().step()


def test_the_mean_of_several_totals_is_weighed_as_one_total(tmp_path):
    assert_same_run(fit(tmp_path, MeanOfTotals), fit(tmp_path, Vendor), rtol=1e-6, atol=1e-6)


class Decayed(Vendor):
    """Its own weight decay stands among the losses."""

    def losses(self, x):
        return super().losses(x) | {"decay": 1e-4 * sum(p.square().sum() for p in self.parameters())}


@pytest.mark.feature("a weight penalty among the losses", "warned", "by its name, with where it belongs")
def test_a_weight_penalty_among_the_losses_is_told(tmp_path):
    with pytest.warns(UserWarning, match=r"Task 'decay': made of .*GradNormCallback would move its weight") as said:
        fit(tmp_path, Decayed)
    assert len([warning for warning in said if "Task 'decay'" in str(warning.message)]) == 1
