"""What becomes of a callback that is copied, pickled, taken to other processes, or used for one fit after another."""

import copy
import gc
import pickle
import warnings

import lightning as L
import pytest
import torch

from lightning_gradnorm import GradNorm, GradNormCallback, LossBalancingCallback, SelfAdaptivePoints
from tests.callbacks.watching import TASKS, Watch, assert_same_history
from tests.helpers import Recorder, TrunkAndHeads, batches, loading, quiet_trainer, same_state


def made(seed=0) -> TrunkAndHeads:
    torch.manual_seed(seed)
    return TrunkAndHeads()


def fit(tmp_path, callback, module=None, steps=6, **settings):
    module = made() if module is None else module
    trainer = quiet_trainer(tmp_path, callbacks=[callback, *settings.pop("callbacks", [])], **settings)
    trainer.fit(module, batches(steps))
    return module


def pickled(thing):
    return pickle.loads(pickle.dumps(thing))


def said(caplog, words):
    return [record for record in caplog.records if words in record.getMessage()]


COPIES = {"deepcopy": copy.deepcopy, "pickle": pickled, "copied twice": lambda c: pickled(copy.deepcopy(c))}


# -- copies ----------------------------------------------------------------------------------------------------------------


@pytest.mark.feature("a callback that is copied or pickled", "supported", "it has what was learnt, and shares nothing")
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: GradNormCallback(lr=0.1, summary=False),
        lambda: GradNormCallback(lr=0.1, engine="per_task", mode="monitor", summary=False),
        lambda: LossBalancingCallback(GradNorm(residuals=["odd"]), summary=False),
    ],
)
def test_a_copy_of_a_fresh_callback_trains_as_its_original(tmp_path, copied, make):
    original = make()
    twin = copied(original)
    one, other = fit(tmp_path, original), fit(tmp_path, twin)
    assert original.weights == twin.weights
    assert list(original.weights) == TASKS
    assert same_state(one.state_dict(), other.state_dict())


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_a_used_callback_has_its_state_and_shares_nothing_with_it(tmp_path, copied):
    original = GradNormCallback(lr=0.1, summary=False, points={"curve": SelfAdaptivePoints(4)})
    fit(tmp_path, original)
    before = copy.deepcopy(original.state_dict())
    twin = copied(original)
    assert same_state(twin.state_dict(), before)
    assert twin.report.rows == original.report.rows
    fit(tmp_path, twin)
    assert twin.balancer.steps == 12, "it goes on from where its original was"
    assert same_state(original.state_dict(), before)
    assert twin.points["curve"] is not original.points["curve"]


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_backward", "on_after_backward", "on_train_batch_end"])
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_made_in_mid_fit_holds_no_trainer_module_graph_or_hook(tmp_path, hook, copied):
    callback, copies = GradNormCallback(lr=0.1, summary=False), []
    taker = L.Callback()
    setattr(taker, hook, lambda *args: copies.append(copied(callback)))
    module = fit(tmp_path, callback, callbacks=[taker])
    twin = copies[2]
    steps = twin.balancer.steps
    assert not {"log", "log_dict"} & vars(twin).keys(), "the Trainer's bound methods of the module"
    found = set()
    stack = [twin]
    while stack:  # everything that it holds
        thing = stack.pop()
        if id(thing) in found or isinstance(thing, type):
            continue
        found.add(id(thing))
        assert not isinstance(thing, L.LightningModule | L.Trainer | torch.nn.Parameter)
        assert not isinstance(thing, torch.Tensor) or thing.grad_fn is None
        stack += thing.values() if isinstance(thing, dict) else list(thing) if isinstance(thing, list | tuple | set) else []
        stack += vars(thing).values() if hasattr(thing, "__dict__") else []
    fit(tmp_path, twin)
    assert twin.balancer.steps == steps + 6
    assert callback.balancer.steps == 6
    assert module.trunk[2].weight.isfinite().all()


def test_a_callback_in_saved_hyperparameters_and_in_a_reloaded_module(tmp_path):
    class Holding(TrunkAndHeads):
        def __init__(self, callback=None):
            super().__init__()
            self.save_hyperparameters()
            self.callback = callback

        def configure_callbacks(self):
            return [self.hparams.callback]

    torch.manual_seed(0)
    module = Holding(GradNormCallback(lr=0.1, summary=False))
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, batches(6))
    trainer.save_checkpoint(tmp_path / "some.ckpt")
    expected = GradNormCallback(lr=0.1, summary=False)
    fit(tmp_path, expected)
    assert module.callback.weights == expected.weights
    again = Holding.load_from_checkpoint(tmp_path / "some.ckpt", **loading(weights_only=False))
    assert again.callback is not module.callback
    assert again.callback.weights == expected.weights
    quiet_trainer(tmp_path).fit(again, batches(6))
    assert again.callback.balancer.steps == 12


def test_a_copy_of_the_whole_trainer_s_callbacks_as_a_tuner_makes_them(tmp_path):
    """One configuration, deep-copied for each trial, the trials one after the other."""
    config = {"callbacks": [GradNormCallback(lr=0.1, summary=False)], "max_epochs": 1}
    weights = []
    for _ in range(2):
        trial = copy.deepcopy(config)
        quiet_trainer(tmp_path, **trial).fit(made(), batches(6))
        weights.append(trial["callbacks"][0].weights)
    assert weights[0] == weights[1] != {}
    assert config["callbacks"][0].weights == {}


# -- one fit after another -------------------------------------------------------------------------------------------------


@pytest.mark.feature(
    "one callback for several folds, each with a module of its own", "supported", "each fold starts anew, and says so"
)
def test_a_fit_of_another_module_starts_anew_and_says_so(tmp_path, caplog):
    callback, fresh = Watch(), Watch()
    fit(tmp_path, callback, made(1))
    first, first_steps = callback.weights, callback.balancer.steps
    callback.applied, callback.norms = [], []
    with caplog.at_level("INFO"):
        fit(tmp_path, callback, made(2))
    assert len(said(caplog, "Watch starts anew, as this is another module than the one of its last fit")) == 1
    fit(tmp_path, fresh, made(2))
    assert_same_history(callback, fresh, rtol=1e-12)
    assert callback.weights == fresh.weights != first
    assert callback.balancer.steps == first_steps == 6
    assert callback.report.rows == fresh.report.rows
    assert {tag: value.item() for tag, value in callback.logged.items()} == pytest.approx(
        {tag: value.item() for tag, value in fresh.logged.items()}
    )


def test_a_fold_that_died_is_another_module_too(tmp_path):
    callback, fresh = GradNormCallback(lr=0.1, summary=False), GradNormCallback(lr=0.1, summary=False)
    fit(tmp_path, callback, made(1))  # nobody keeps this module
    fit(tmp_path, callback, made(2))
    fit(tmp_path, fresh, made(2))
    assert callback.weights == fresh.weights


def test_a_fit_of_the_same_module_goes_on_and_says_so(tmp_path, caplog):
    callback, module = GradNormCallback(lr=0.1, summary=False), made()
    fit(tmp_path, callback, module)
    before = callback.weights
    with caplog.at_level("INFO"):
        seen = Recorder(callback)
        fit(tmp_path, callback, module, callbacks=[seen])
    assert len(said(caplog, "goes on with what it learnt in 6 steps")) == 1
    assert callback.balancer.steps == 12
    assert seen.weights[0] != before
    assert seen.weights[0] == pytest.approx(before, rel=0.5)


def test_a_loaded_state_goes_on_whatever_the_module_is(tmp_path):
    callback, loaded = GradNormCallback(lr=0.1, summary=False), GradNormCallback(lr=0.1, summary=False)
    fit(tmp_path, callback, made(1))
    fit(tmp_path, loaded, made(2))
    loaded.load_state_dict(callback.state_dict())
    fit(tmp_path, loaded, made(3))
    assert loaded.balancer.steps == 12


def test_a_checkpoint_goes_on_in_another_module(tmp_path, caplog):
    callback, module = GradNormCallback(lr=0.1, summary=False), made()
    trainer = quiet_trainer(tmp_path, callbacks=[callback])
    trainer.fit(module, batches(6))
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    fit(tmp_path, callback, made(5))  # something else in between
    caplog.clear()
    with caplog.at_level("INFO"):
        trainer = quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2)
        trainer.fit(made(6), batches(6), ckpt_path=tmp_path / "six.ckpt", **loading(weights_only=True))
    assert callback.balancer.steps == 12
    assert not said(caplog, "starts anew")


def test_warnings_speak_again_in_the_next_fit(tmp_path):
    class Broken(TrunkAndHeads):
        def losses(self, x):
            return {task: loss * torch.nan for task, loss in super().losses(x).items()}

    callback = GradNormCallback(lr=0.1, summary=False)
    for _ in range(2):
        with pytest.warns(UserWarning, match="GradNormCallback skipped 1 weight update so far"):
            fit(tmp_path, callback, Broken(), steps=2)


def test_evaluation_between_two_fits_is_no_other_life(tmp_path):
    class Tested(TrunkAndHeads):
        def test_step(self, batch, batch_idx):
            self.log("test", self.total_loss(self.losses(batch[0])))

    torch.manual_seed(0)
    callback, module = GradNormCallback(lr=0.1, summary=False), Tested()
    fit(tmp_path, callback, module)
    quiet_trainer(tmp_path, callbacks=[callback]).test(Tested(), batches(2), verbose=False)
    fit(tmp_path, callback, module)
    assert callback.balancer.steps == 12


# -- processes that a launcher makes -----------------------------------------------------------------------------------------


class Halves(TrunkAndHeads):
    """Each of two ranks takes its half of every batch; the shared layer is given, so that both name the same."""

    def shared_layer(self):
        return self.trunk[2]

    def training_step(self, batch, batch_idx):
        x = batch[0].chunk(self.trainer.world_size)[self.global_rank]
        return self.total_loss(self.losses(x))


def fit_on_two(tmp_path, strategy, callback, module=None, **settings):
    torch.manual_seed(0)
    module = Halves() if module is None else module
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's own
        both = {"strategy": strategy, "devices": 2, "use_distributed_sampler": False} if strategy else {}
        trainer = quiet_trainer(tmp_path, callbacks=[callback], **both, **settings)
        trainer.fit(module, batches(6))
    return trainer, module


@pytest.mark.slow
@pytest.mark.feature(
    '`strategy="ddp_spawn"`, `"ddp_notebook"`', "supported", "weights, report and logged values come home to the main process"
)
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_what_a_launched_process_learnt_comes_home(tmp_path, strategy):
    callback, alone = (GradNormCallback(lr=0.1, summary=False) for _ in "ab")
    trainer, module = fit_on_two(tmp_path, strategy, callback)
    expected, its_module = fit_on_two(tmp_path, None, alone)
    assert callback.weights == pytest.approx(alone.weights, rel=1e-5)
    assert list(callback.weights) == TASKS
    assert callback.balancer.steps == 6
    assert callback.engine_used == "joint"
    assert callback.shared.names == ("trunk.2.weight", "trunk.2.bias")
    assert callback.mean_weights == pytest.approx(alone.mean_weights, rel=1e-5)
    assert callback.report.steps == 6
    tags = {tag for tag in expected.callback_metrics if "/" in tag}
    assert tags <= set(trainer.callback_metrics)
    assert {tag: callback.logged[tag].item() for tag in alone.logged} == pytest.approx(
        {tag: value.item() for tag, value in alone.logged.items()}, rel=1e-4
    )
    for ours, theirs in zip(module.parameters(), its_module.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    trainer.save_checkpoint(tmp_path / "home.ckpt")
    saved = torch.load(tmp_path / "home.ckpt", weights_only=True)["callbacks"]
    assert saved["LossBalancing[GradNorm]"]["balancer"]["steps"] == 6


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_notebook"])
def test_from_a_launched_process_to_the_next(tmp_path, strategy):
    """The same module goes on, another one starts anew, though each fit was in processes of its own."""
    callback = GradNormCallback(lr=0.1, summary=False)
    _, module = fit_on_two(tmp_path, strategy, callback)
    first, twin = callback.weights, pickled(callback)
    fit_on_two(tmp_path, strategy, callback, module)
    assert twin.weights == first, "news is for the callback that was launched"
    assert callback.balancer.steps == 12
    assert callback.weights != first
    fit_on_two(tmp_path, strategy, callback)
    assert callback.balancer.steps == 6
    assert callback.weights == pytest.approx(first)


@pytest.mark.slow
def test_what_a_launched_process_wrote_is_left_nowhere(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    callback = GradNormCallback(lr=0.1, summary=False)
    fit_on_two(tmp_path, "ddp_notebook", callback)
    assert len(list(tmp_path.glob("lightning-gradnorm-*"))) == 1
    assert callback.balancer.steps == 6
    assert not list(tmp_path.glob("lightning-gradnorm-*"))
    fit_on_two(tmp_path, "ddp_notebook", callback)
    del callback
    gc.collect()
    assert not list(tmp_path.glob("lightning-gradnorm-*")), "nobody has asked for it"
