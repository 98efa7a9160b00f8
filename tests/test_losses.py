"""What a dict of losses may hold."""

from types import MappingProxyType

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_gradnorm.losses import check_losses, plain_sum, unweighted_total
from tests.helpers import Labelled


def loss(value: float = 2.0) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True) * 1.0


BAD_DICTS = [
    pytest.param({}, ValueError, "needs at least one task's loss, got none.*return None from training_step", id="empty dict"),
    pytest.param([], ValueError, "needs at least one task's loss", id="no pairs"),
    pytest.param(None, TypeError, r"takes a dict of task name → loss, got NoneType\. Write total_loss", id="None"),
    pytest.param(3.0, TypeError, "takes a dict of task name → loss, got float", id="a number"),
    pytest.param(loss(), TypeError, "takes a dict of task name → loss, got Tensor", id="one loss"),
    pytest.param(torch.ones(2), TypeError, "takes a dict of task name → loss, got Tensor", id="a vector of losses"),
    pytest.param([loss(), loss()], TypeError, "takes a dict of task name → loss", id="a list of losses"),
    pytest.param((loss(), loss()), TypeError, "takes a dict of task name → loss", id="a tuple of losses"),
    pytest.param(["depth", "normals"], TypeError, "takes a dict of task name → loss", id="a list of names"),
    pytest.param("depth", TypeError, "takes a dict of task name → loss", id="a name"),
]


@pytest.mark.parametrize(("losses", "error", "words"), BAD_DICTS)
def test_what_is_no_dict_of_losses_is_refused(losses, error, words):
    for differentiable in (True, False):
        with pytest.raises(error, match=words):
            check_losses(losses, differentiable=differentiable)


BAD_LOSSES = [
    pytest.param(1.5, TypeError, "loss of task 'bad' is a float; every loss is a scalar tensor", id="a number"),
    pytest.param(None, TypeError, "loss of task 'bad' is a NoneType; every loss is a scalar tensor", id="None"),
    pytest.param(loss().expand(3), ValueError, r"loss of task 'bad' has shape \(3,\).*is a scalar.*\.mean\(\)", id="vector"),
    pytest.param(loss().view(1, 1), ValueError, r"loss of task 'bad' has shape \(1, 1\)", id="matrix"),
    pytest.param(loss() * 1j, ValueError, r"task 'bad' is complex \(torch\.complex64\).*loss\.abs\(\)", id="complex"),
    pytest.param(torch.tensor(3), ValueError, r"task 'bad' is not a floating-point number \(torch\.int64\)", id="integer"),
    pytest.param(torch.tensor(True), ValueError, r"task 'bad' is not a floating-point number \(torch\.bool\)", id="bool"),
]


@pytest.mark.parametrize(("bad", "error", "words"), BAD_LOSSES)
@pytest.mark.parametrize("differentiable", [True, False])
def test_a_loss_that_is_no_real_scalar_is_refused(bad, error, words, differentiable):
    with pytest.raises(error, match=words):
        check_losses({"good": loss(), "bad": bad}, differentiable=differentiable)


def test_a_detached_loss_is_refused_only_where_a_backward_follows():
    losses = {"good": loss(), "bad": loss().detach()}
    with pytest.raises(ValueError, match=r"loss of task 'bad' is detached.*can train nothing.*leave the task out of the dict"):
        check_losses(losses, differentiable=True)
    assert check_losses(losses, differentiable=False) == losses


# -- a task that is absent, and other forms of a scalar -----------------------------------------------------------------

ABSENT = {
    "0.0": 0.0,
    "0": 0,
    "-0.0": -0.0,
    "a number of numpy": np.float32(0.0),
    "an array of numpy": np.array(0.0),
    "detached": torch.zeros(()),
    "detached, one entry": torch.zeros(1),
    "detached, whole": torch.tensor(0),
    "detached, half": torch.zeros((), dtype=torch.float16),
    "multiplied away": loss().detach() * 0,
}


@pytest.mark.parametrize("zero", ABSENT.values(), ids=ABSENT)
def test_a_zero_that_can_train_nothing_means_that_the_task_is_absent(zero):
    here = loss()
    assert check_losses({"boxes": zero, "here": here}, differentiable=True) == {"here": here}
    assert check_losses({"boxes": zero}, differentiable=True) == {}
    assert check_losses({"boxes": zero}, differentiable=True, per_point=["boxes"]) == {}


def test_a_zero_with_a_graph_is_a_loss():
    zero = loss() * 0
    assert check_losses({"a": zero}, differentiable=True) == {"a": zero}


@pytest.mark.parametrize("value", [False, torch.tensor(False), True, 1e-30, -1, None, "0.0"])
def test_what_is_no_zero_is_no_absent_task(value):
    with pytest.raises((TypeError, ValueError), match="loss of task 'bad' is"):
        check_losses({"good": loss(), "bad": value}, differentiable=True)


def test_an_absent_task_has_a_name_that_can_be_one():
    with pytest.raises(ValueError, match="cannot be part of a logger's tag"):
        check_losses({"a/": 0.0, "b": loss()}, differentiable=True)


def test_where_no_backward_follows_a_zero_of_a_tensor_is_a_value():
    zero = torch.zeros(())
    assert check_losses({"a": zero, "b": 0.0}, differentiable=False) == {"a": zero}


def test_the_sum_of_no_losses_can_be_trained_and_trains_nothing():
    total = plain_sum(check_losses({"a": 0.0, "b": torch.zeros(())}, differentiable=True))
    assert total == 0 and total.requires_grad
    total.backward()
    with torch.no_grad():
        assert not plain_sum({}).requires_grad


@pytest.mark.parametrize("differentiable", [True, False])
def test_one_entry_is_a_scalar(differentiable):
    w = torch.tensor([3.0], requires_grad=True)
    checked = check_losses({"a": w * 2}, differentiable=differentiable)["a"]
    assert checked.shape == () and checked == 6
    checked.backward()
    assert w.grad == 2
    points = w * 2
    assert check_losses({"a": points}, differentiable=differentiable, per_point=["a"])["a"] is points


class OfItsOwn(torch.Tensor):
    """Holds its numbers elsewhere, as a DTensor does."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, requires_grad=inner.requires_grad)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError


@pytest.mark.parametrize("differentiable", [True, False])
def test_a_subclass_that_only_adds_attributes_is_taken_as_a_plain_tensor(differentiable):
    w = torch.tensor(3.0, requires_grad=True)
    labelled = (w * 2).as_subclass(Labelled)
    with pytest.raises(AttributeError):
        labelled * 2
    checked = check_losses({"a": labelled}, differentiable=differentiable)["a"]
    assert type(checked) is torch.Tensor
    (checked * 2).backward()
    assert w.grad == 4


def test_a_subclass_with_numbers_of_its_own_is_left_alone():
    own = OfItsOwn(torch.tensor(1.0, requires_grad=True))
    assert check_losses({"a": own}, differentiable=True)["a"] is own


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_any_value_and_any_float_type_pass(value, dtype):
    it = loss(value).to(dtype)
    assert check_losses({"a": it}, differentiable=True)["a"] is it


@pytest.mark.parametrize(
    "form", [dict, MappingProxyType, lambda d: list(d.items()), lambda d: iter(d.items()), lambda d: d.items()]
)
def test_order_and_tensors_are_kept(form):
    losses = {task: loss() for task in ("z", "a", "m", "B")}
    checked = check_losses(form(losses), differentiable=True)
    assert type(checked) is dict
    assert list(checked) == ["z", "a", "m", "B"]
    assert all(checked[task] is losses[task] for task in losses)


@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=8))
def test_plain_sum_is_what_plus_gives(values):
    parameters = [torch.tensor(value, requires_grad=True) for value in values]
    total = plain_sum({str(i): p * 1.0 for i, p in enumerate(parameters)})
    expected = parameters[0].detach()
    for p in parameters[1:]:
        expected = expected + p.detach()
    assert torch.equal(total.detach(), expected)
    total.backward()
    assert all(p.grad == 1 for p in parameters)


def test_unweighted_total_leaves_absent_tasks_out():
    assert unweighted_total(torch.tensor([1.0, torch.nan, 2.5])) == 3.5


def test_what_is_added_in_place_to_the_sum_of_one_loss_leaves_it_as_it_is():
    with torch.no_grad():
        only = loss(2.0).detach()
        total = plain_sum({"a": only})
        total += 1
    assert (only, total) == (2, 3)
