"""Through the Trainer: batches in which a task has nothing to learn, and names as a table's column gives them."""

import numpy as np
import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger

from lightning_gradnorm import GradNormCallback, LearningRateAnnealing, LossBalancingCallback
from tests.helpers import SCALES, Recorder, TrunkAndHeads, batches, quiet_trainer

ONES = dict.fromkeys(SCALES, 1.0)


class Detector(TrunkAndHeads):
    """What the task ``small`` has of a batch: its loss, or what ``instead`` makes of it on the given steps."""

    def __init__(self, instead, steps):
        super().__init__()
        self.instead, self.steps = instead, steps

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        if batch_idx in self.steps:
            losses = self.instead(losses)
        return self.total_loss(losses)


def nothing_of(value):
    return lambda losses: losses | {"small": value}


def no_gradient(losses):
    return losses | {"small": losses["small"] * 0}


def no_key(losses):
    return {task: loss for task, loss in losses.items() if task != "small"}


def run(tmp_path, module, **settings):
    torch.manual_seed(0)
    callback = GradNormCallback(summary=False, **settings)
    recorder = Recorder(callback)
    quiet_trainer(tmp_path, callbacks=[callback, recorder]).fit(module, batches(6))
    return callback, recorder


@pytest.mark.parametrize("value", [0.0, 0, torch.zeros(()), torch.zeros(1)], ids=repr)
@pytest.mark.parametrize("steps", [(0,), (2, 3), (0, 1, 5)], ids=str)
def test_a_term_of_zero_is_a_term_left_out(tmp_path, value, steps):
    _, ours = run(tmp_path, seeded(nothing_of(value), steps))
    _, left_out = run(tmp_path, seeded(no_key, steps))
    assert ours.weights == left_out.weights
    assert all(map(torch.equal, ours.parameters, left_out.parameters))


def seeded(instead, steps):
    torch.manual_seed(0)
    return Detector(instead, steps)


@pytest.mark.filterwarnings("ignore:Tasks that took no part so far, .*'small' in")
@pytest.mark.parametrize("steps", [(0,), (2, 3), (0, 1, 5)], ids=str)
@pytest.mark.parametrize("engine", ["joint", "per_task"])
def test_a_loss_without_a_gradient_is_a_term_left_out(tmp_path, engine, steps):
    """A first detection batch without boxes among them. Its head is not trained, as by a term that is left out."""
    ours, recorded = run(tmp_path, seeded(no_gradient, steps), engine=engine)
    _, left_out = run(tmp_path, seeded(no_key, steps), engine=engine)
    for mine, its in zip(recorded.weights, left_out.weights, strict=True):
        assert {task: mine[task] for task in its} == pytest.approx(its, rel=1e-5)
    idle = dict(zip(ours.balancer.tasks, ours.balancer.idle_steps.tolist(), strict=True))
    assert idle == dict.fromkeys(SCALES, 0) | {"small": len(steps)}
    assert ours.balancer.skipped_updates == 0


def test_a_batch_in_which_all_terms_are_absent_trains_nothing_and_goes_on(tmp_path):
    callback, recorder = run(tmp_path, seeded(lambda losses: dict.fromkeys(losses, 0.0), (1, 2)))
    assert recorder.weights[0] == recorder.weights[1] == recorder.weights[2] != recorder.weights[3]
    assert torch.equal(recorder.parameters[0], recorder.parameters[2])
    assert callback.balancer.steps == 4, "what was balanced"


def test_an_evaluation_batch_in_which_all_terms_are_absent_counts_in_no_mean(tmp_path):
    class Evaluated(TrunkAndHeads):
        def validation_step(self, batch, batch_idx):
            losses = self.losses(batch[0])
            self.sums.append(sum(losses.values()))
            self.total_loss(losses if batch_idx else dict.fromkeys(losses, 0.0))

    module, callback = Evaluated(lr=0.0), GradNormCallback(summary=False)
    module.sums = []
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, batches(2), batches(3, seed=2))
    expected = sum(module.sums[1:]) / 2
    assert trainer.callback_metrics["val_total_loss"].item() == pytest.approx(expected.item(), rel=1e-5)


class Named(TrunkAndHeads):
    """Its tasks are called what a column of a table holds."""

    names = np.array(list(SCALES))

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch[0])
        return self.total_loss({name: losses[str(name)] for name in self.names})


@pytest.mark.parametrize(
    "make",
    [
        lambda names: GradNormCallback(tasks=names, priorities={names[0]: np.float32(2)}, update_every=np.int64(2)),
        lambda names: GradNormCallback(residuals=names[1:2], alpha=np.float64(0.5), initial_losses={names[2]: np.array(2.0)}),
        lambda names: LossBalancingCallback(LearningRateAnnealing(names[1], update_every=torch.tensor(2))),
    ],
)
def test_names_and_numbers_of_numpy_come_through_fit_checkpoint_and_file(tmp_path, make):
    callback = make(Named.names)
    logger = CSVLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, callbacks=[callback], logger=logger)
    trainer.fit(Named(), batches(4))
    trainer.save_checkpoint(tmp_path / "it.ckpt")
    state = torch.load(tmp_path / "it.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert state["balancer"]["tasks"] == list(SCALES)
    assert {type(task) for task in callback.weights} == {str}
    (file,) = tmp_path.rglob("loss_weights.yaml")
    assert set(yaml.safe_load(file.read_text(encoding="utf-8"))["tasks"]) == set(SCALES)
