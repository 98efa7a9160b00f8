"""``diagnose`` on modules whose gradients are known, and what it says of them."""

import copy

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import MultiTaskMixin, diagnose
from lightning_gradnorm.diagnosis import Diagnosis
from tests.helpers import TrunkAndHeads, batches, same_state


class Known(MultiTaskMixin, L.LightningModule):
    """Losses that are linear in one shared vector w: the gradients are the given vectors, whatever w is."""

    def __init__(self, gradients):
        super().__init__()
        self.w = nn.Linear(4, 1, bias=False)
        self.gradients = {task: torch.tensor(g) for task, g in gradients.items()}

    def shared_layer(self):
        return self.w

    def training_step(self, batch, batch_idx):
        return self.total_loss({task: self.w(g).sum() + 100.0 for task, g in self.gradients.items()})

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def data():
    return DataLoader(TensorDataset(torch.zeros(400)), batch_size=1)


def of(**gradients):
    return diagnose(Known(gradients), data(), batches=8, accelerator="cpu")


def test_numbers_of_gradients_that_are_known():
    found = of(a=[3.0, 4.0, 0.0, 0.0], b=[0.0, 0.0, 0.0, 10.0], c=[-3.0, -4.0, 0.0, 0.0])
    assert found.norms == pytest.approx({"a": 5.0, "b": 10.0, "c": 5.0}, rel=1e-5)
    assert found.shares == pytest.approx({"a": 0.25, "b": 0.5, "c": 0.25}, rel=1e-5)
    assert found.cosines == pytest.approx({("a", "b"): 0.0, ("a", "c"): -1.0, ("b", "c"): 0.0}, abs=1e-6)
    assert found.conflicts == pytest.approx({("a", "b"): 0.0, ("a", "c"): 1.0, ("b", "c"): 0.0})
    assert found.spread == pytest.approx(2.0, rel=1e-5)
    assert found.conflicting == [("a", "c")]
    assert found.batches == 8
    assert "w.weight" in found.layer


def test_gradients_of_like_size_need_no_weighting():
    found = of(a=[1.0, 0.0, 0.0, 0.0], b=[0.0, 2.0, 0.0, 0.0])
    assert found.weighting == "not needed"
    assert "You do not need loss weighting here" in str(found)
    assert "within 2.0×" in str(found)
    assert "gradient surgery has little to do" in str(found)


@pytest.mark.parametrize(("size", "verdict"), [(5.0, "may help"), (500.0, "can help")])
def test_gradients_of_other_size_do(size, verdict):
    found = of(a=[1.0, 0.0, 0.0, 0.0], big=[0.0, size, 0.0, 0.0])
    assert found.weighting == verdict
    assert f"The gradient of 'big' is {size:.3g}× that of 'a'" in str(found)


def test_a_task_that_the_others_outvote_is_for_surgery():
    found = of(a=[1.0, 0.0, 0.0, 0.0], b=[1.0, 0.3, 0.0, 0.0], c=[-1.0, 0.0, 1.0, 0.0])
    assert found.undone["c"] == pytest.approx(0.5**0.5 * (1 + 1 / 1.09**0.5), rel=1e-4)
    assert found.undone["a"] < 0 and found.undone["b"] < 0, "they help each other"
    assert found.advice[-1] == (
        "'a' and 'c' pull against each other (mean cosine -0.71, below 0 on 100% of the batches). With gradients of one size "
        "the others would undo 138% of what a step gains 'c', and less than half of another's. Gradient surgery can even that "
        "out: try GramianWeighting beside GradNormCallback(), and compare(). See docs/gradient-surgery.md."
    )


def test_where_all_lose_alike_there_is_nothing_to_shift():
    found = of(a=[1.0, 0.0, 0.0, 0.0], b=[-1.0, 1.0, 0.0, 0.0])
    assert found.undone == pytest.approx({"a": 0.5**0.5, "b": 0.5**0.5}, rel=1e-5)
    assert found.advice[-1] == (
        "'a' and 'b' pull against each other (mean cosine -0.71, below 0 on 100% of the batches). With gradients of one size "
        "the others would undo 71% of what a step gains 'a', and half or more of every other task's gain. No weights, and so "
        "no gradient surgery, can give to one without taking from another here: give each task more layers of its own. See "
        "docs/gradient-surgery.md."
    )


def test_a_mild_conflict_is_not():
    found = of(a=[1.0, 0.0, 0.0, 0.0], b=[-0.16, 0.98, 0.0, 0.0], c=[0.1, 0.0, 1.0, 0.0])
    assert found.conflicting == [("a", "b")]
    assert found.advice[-1] == (
        "'a' and 'b' pull against each other (mean cosine -0.16, below 0 on 100% of the batches). With gradients of one size "
        "the others would undo 18% of what a step gains 'b', and no more of any other task's: too little for gradient surgery "
        "(GramianWeighting), which is worth a try from a half on."
    )


def test_a_conflict_that_other_tasks_outweigh_undoes_nothing():
    found = of(a=[1.0, 0.0, 0.0, 0.0], b=[-0.16, 0.98, 0.0, 0.0], c=[1.0, 1.0, 0.0, 0.0])
    assert found.conflicting == [("a", "b")] and max(found.undone.values()) < 0
    assert "the others would undo 0% of what a step gains" in found.advice[-1]


def test_a_task_that_many_are_a_little_against_is_for_surgery():
    found = of(odd=[1.0, 0.0, 0.0, 0.0], **{f"t{k}": [-0.09, 1.0, 0.0, 0.0] for k in range(7)})
    assert found.conflicting == []
    assert found.undone["odd"] == pytest.approx(7 * 0.09 / 1.0081**0.5, rel=1e-4)
    assert found.undone["t0"] < -5, "the others help"
    assert found.advice[-1].startswith("With gradients of one size the others would undo 63% of what a step gains 'odd', and")


def test_what_is_undone_is_what_a_step_along_the_sum_of_even_gradients_loses():
    gradients = {"a": [3.0, 4.0, 0.0, 0.0], "b": [-8.0, 1.0, 2.0, 0.0], "c": [0.5, 0.0, 0.1, 0.0]}
    even = {task: torch.tensor(g) / torch.tensor(g).norm() for task, g in gradients.items()}
    gains = {task: float(g @ sum(even.values())) for task, g in even.items()}
    assert of(**gradients).undone == pytest.approx({task: 1 - gain for task, gain in gains.items()}, rel=1e-4)


def test_one_task_and_a_task_without_gradient():
    assert of(a=[1.0, 0.0, 0.0, 0.0]).advice == ["There is one task only, so there is nothing to balance."]
    silent = of(a=[1.0, 0.0, 0.0, 0.0], b=[0.0, 0.0, 0.0, 0.0])
    assert silent.norms["b"] == 0
    assert "Task 'b' has no gradient on the shared layer at all" in str(silent)


def test_the_module_and_the_random_numbers_stay_as_they_are():
    module = TrunkAndHeads()
    before, state = copy.deepcopy(module.state_dict()), torch.random.get_rng_state()
    found = diagnose(module, batches(30), accelerator="cpu")
    assert isinstance(found, Diagnosis)
    assert same_state(module.state_dict(), before)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert module._trainer is None
    assert found.batches == 20
    assert found.norms["large"] > 100 * found.norms["small"]
    assert found.loss_ratios["large"] < 1


def test_norms_are_those_of_autograd():
    module = TrunkAndHeads()
    x = next(iter(batches(1)))[0]
    found = diagnose(module, batches(1), batches=1, accelerator="cpu")
    for task, loss in module.losses(x).items():
        (gradient,) = torch.autograd.grad(loss, module.trunk[2].weight, retain_graph=True)
        assert found.norms[task] == pytest.approx(gradient.norm().item(), rel=1e-4)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return batches(5)


def test_a_datamodule_will_do_and_few_batches_are_taken_again():
    assert diagnose(TrunkAndHeads(), Data(), batches=7, accelerator="cpu").batches == 7


@pytest.mark.parametrize("count", [0, -1, 2.5, True])
def test_a_number_of_batches_that_is_none(count):
    with pytest.raises(ValueError, match="batches is a whole number, 1 or more"):
        diagnose(TrunkAndHeads(), batches(5), batches=count)


def test_a_module_without_the_mixin_and_something_else():
    with pytest.raises(TypeError, match="A LightningModule is needed, got Linear"):
        diagnose(nn.Linear(2, 2), batches(2))

    class Plain(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 2)

        def training_step(self, batch, batch_idx):
            return self.layer(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.01)

    with pytest.raises(RuntimeError, match=r"The training_step of Plain never called total_loss\(\)"):
        diagnose(Plain(), batches(2), accelerator="cpu")


# -- regularisers ----------------------------------------------------------------------------------------------------------


class Regularised(TrunkAndHeads):
    """Two tasks, a weight penalty that is large, and whatever is called as ``name`` says."""

    def __init__(self, name="odd"):
        super().__init__(scales={"middle": 1.0, "odd": 1.0})
        self.name = name

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        penalty = 10 * sum(p.square().sum() for p in self.trunk.parameters())
        return self.total_loss({"middle": losses["middle"], self.name: losses["odd"], "shrink": penalty})


def test_a_weight_penalty_is_named_and_has_no_part_in_the_verdict():
    found = diagnose(Regularised(), batches(5), batches=5, accelerator="cpu")
    assert found.penalties == ("shrink",)
    assert found.norms["shrink"] > 10 * found.norms["odd"] > 0
    assert found.weighting == "not needed" and found.spread < 3
    assert "'shrink': made of the network's parameters alone, whatever the data, and so a weight penalty and no task" in str(
        found
    )
    assert all("shrink" not in pair for pair in found.conflicting)
    assert "regulariser?" not in str(found)


def test_what_is_called_a_regulariser_is_asked_about():
    found = diagnose(Regularised("kl_loss"), batches(5), batches=5, accelerator="cpu")
    assert "Is 'kl_loss' a regulariser? One that pulls towards a prior" in str(found)
    assert "A term that has data to fit, as in distillation, is a task." in str(found)


def test_one_task_beside_a_penalty_has_nothing_to_balance():
    found = Diagnosis({"a": 1.0, "l2": 2.0}, {}, {}, {}, {}, 1, "w", ["l2"])
    assert [sentence[:23] for sentence in found.advice] == ["'l2': made of the netwo", "There is one task only,"]


@pytest.mark.parametrize("example", ["toy", "digits_problem", "pinn"], indirect=True)
def test_of_the_tasks_of_the_examples_nothing_of_the_kind_is_said(example):
    of = {
        "toy": lambda: (example.Toy([1.0, 10.0], 1e-3), example.ToyData(2, seed=0, steps=3)),
        "digits_problem": lambda: (example.Digits(), example.DigitsData()),
        "pinn": lambda: (
            example.Helmholtz(),
            example.Draws(lambda draws: [example.uniform([-1, -1], [1, 1], 8, draws) for _ in range(3)], seed=0, steps=3),
        ),
    }
    module, data = of[example.__name__]()
    found = diagnose(module, data, batches=3, accelerator="cpu")
    assert not found.penalties
    assert "regulariser" not in str(found) and len(found.norms) > 1
