"""Each Trainer feature against the same run without it, or against a loop written by hand."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.callbacks.refusals import check_strategy
from tests.callbacks.watching import TASKS, OnTensors, Watch, assert_same_history, loader, norms_by_hand, train
from tests.helpers import quiet_trainer

# -- precision ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature(
    '`precision="16-mixed"` (GradScaler)',
    "supported",
    "whatever the scale; a step that overflows is skipped for the weights too",
)
@pytest.mark.filterwarnings("ignore:.*weight update.* so far")
@pytest.mark.parametrize("init_scale", [1.0, 65536.0, 2.0**40])
def test_grad_scaler_is_divided_out_exactly(tmp_path, init_scale):
    """float16 on the CPU through the plugin; "16-mixed" itself falls back to bfloat16 there."""
    x, module = torch.randn(6, 8, 6), OnTensors(scales=dict.fromkeys(TASKS, 0.01))

    def half(scale):
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=10**6)
        callback = Watch()
        train(tmp_path, copy.deepcopy(module), loader(x), callback, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
        return callback

    scaled, plain = half(init_scale), half(4.0)
    if init_scale == 2.0**40:  # every step overflows until the scaler has come down: the weights skip those too
        assert scaled.balancer.skipped_updates == 6
        assert scaled.weights == dict.fromkeys(TASKS, 1.0)
    else:
        torch.testing.assert_close(torch.stack(scaled.norms), torch.stack(plain.norms), rtol=2e-2, atol=0)
        assert scaled.balancer.skipped_updates == 0


@pytest.mark.feature("`bf16-mixed`, `bf16-true`, `64-true`", "supported", "norms are summed in float64; the state is float64")
@pytest.mark.parametrize(("precision", "rtol"), [("bf16-mixed", 0.05), ("bf16-true", 0.1), ("64-true", 1e-4)])
def test_precision(tmp_path, precision, rtol):
    x, module = torch.randn(4, 64, 6), OnTensors(lr=1e-4)
    full = train(tmp_path, copy.deepcopy(module), loader(x))
    other = train(tmp_path, copy.deepcopy(module), loader(x), precision=precision)
    assert_same_history(other, full, rtol)
    state = other.state_dict()["balancer"]
    assert state["weights"].dtype == torch.float64
    assert {vector.dtype for vector in state["memory"].values()} == {torch.float64}


# -- clipping, anomaly, profiler ------------------------------------------------------------------------------------------


@pytest.mark.feature("`gradient_clip_val`, by norm and by value", "supported", "norms are those before clipping")
@pytest.mark.parametrize(
    "settings",
    [{"gradient_clip_val": 1e-6}, {"gradient_clip_val": 1e-6, "gradient_clip_algorithm": "value"}],
    ids=["norm", "value"],
)
def test_norms_are_those_before_clipping(tmp_path, settings):
    x, module = torch.randn(4, 8, 6), OnTensors(lr=0.0)
    assert_same_history(train(tmp_path, copy.deepcopy(module), loader(x), **settings), train(tmp_path, module, loader(x)))


@pytest.mark.feature("`detect_anomaly`, `profiler`, `deterministic`, `inference_mode`", "supported", "unaffected")
@pytest.mark.filterwarnings("ignore:You have turned on `Trainer\\(detect_anomaly=True\\)`")
@pytest.mark.parametrize(
    "settings", [{"detect_anomaly": True}, {"profiler": "simple"}, {"deterministic": True}, {"inference_mode": False}], ids=str
)
def test_run_settings_change_nothing(tmp_path, settings):
    x, module = torch.randn(4, 8, 6), OnTensors()
    one = train(tmp_path, copy.deepcopy(module), loader(x), **settings)
    torch.use_deterministic_algorithms(False)
    assert_same_history(one, train(tmp_path, module, loader(x)), rtol=1e-12)


# -- manual optimisation, closures -----------------------------------------------------------------------------------------


class Manual(OnTensors):
    def __init__(self, raw=False):
        super().__init__()
        self.automatic_optimization = False
        self.raw = raw

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        total = self.total_loss(self.losses(batch))
        optimizer.zero_grad()
        total.backward() if self.raw else self.manual_backward(total)
        optimizer.step()


@pytest.mark.feature("manual optimisation with `manual_backward`", "supported", "same weights as automatic")
def test_manual_optimisation_equals_automatic(tmp_path):
    x, automatic, manual = torch.randn(6, 8, 6), OnTensors(), Manual()
    manual.load_state_dict(automatic.state_dict())
    assert_same_history(train(tmp_path, manual, loader(x)), train(tmp_path, automatic, loader(x)), rtol=1e-12)


@pytest.mark.feature(
    "a raw `.backward()` in manual optimisation", "warned", "“Call self.manual_backward(total) instead of total.backward()”"
)
def test_a_raw_backward_in_manual_optimisation_is_told_once(tmp_path):
    with pytest.warns(UserWarning, match=r"Call self.manual_backward\(total\) instead of total.backward\(\)") as caught:
        callback = train(tmp_path, Manual(raw=True), loader(torch.randn(3, 8, 6)))
    assert sum("manual_backward" in str(warning.message) for warning in caught) == 1
    assert callback.weights == {}


class Adversarial(OnTensors):
    """Two tasks in the generator, and a discriminator with a loss of its own."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.critic = nn.Linear(2, 1)

    def generator(self, x):
        out = self.heads["middle"](self.trunk(x))
        return out, {"adversarial": -self.critic(out).mean(), "content": 10 * (out - x[:, :2]).pow(2).mean() + 3}

    def training_step(self, batch, batch_idx):
        generator, critic = self.optimizers()
        out, losses = self.generator(batch)
        total = self.total_loss({"adversarial": losses["adversarial"].exp(), "content": losses["content"]})
        critic.zero_grad()
        self.manual_backward(self.critic(out.detach()).mean() - self.critic(batch[:, :2]).mean())
        generator.zero_grad()
        self.manual_backward(total)
        generator.step()
        critic.step()

    def configure_optimizers(self):
        shared = [*self.trunk.parameters(), *self.heads.parameters()]
        return torch.optim.SGD(shared, lr=0.01), torch.optim.SGD(self.critic.parameters(), lr=0.01)


@pytest.mark.feature("several optimisers (a GAN with two tasks in the generator)", "supported")
def test_several_optimisers_and_a_foreign_backward_in_between(tmp_path):
    x, module = torch.randn(6, 8, 6), Adversarial()
    by_hand = copy.deepcopy(module)
    callback = GradNormCallback(lr=0.1, summary=False)
    quiet_trainer(tmp_path, callbacks=[callback]).fit(module, loader(x))
    assert callback.balancer.steps == 6
    # the first step by hand: norms of the two generator losses on the last shared weight
    by_hand.automatic_optimization = True
    _, losses = by_hand.generator(x[0])
    shared = callback.shared.names[0]
    weight = dict(by_hand.named_parameters())[shared]
    expected = norms_by_hand(weight, [losses["adversarial"].exp(), losses["content"]])
    fresh = GradNormCallback(lr=0.1, summary=False)
    again = Adversarial()
    again.load_state_dict(by_hand.state_dict())
    quiet_trainer(tmp_path, callbacks=[fresh], max_steps=2).fit(again, loader(x[:1]))
    torch.testing.assert_close(fresh.balancer.diagnostics["grad_norm"].float(), expected)


@pytest.mark.feature(
    "L-BFGS and other closures", "supported", "measured at the first evaluation; the weights are constant inside the closure"
)
def test_closures_measure_once_and_hold_the_weights(tmp_path):
    class Closures(OnTensors):
        def configure_optimizers(self):
            return torch.optim.LBFGS(self.parameters(), lr=0.1, max_iter=5)

    x, module = torch.randn(4, 8, 6), Closures()
    callback = train(tmp_path, copy.deepcopy(module), loader(x))
    assert callback.balancer.steps == 4
    assert len(callback.inside) > 8
    runs = [callback.inside[0]]
    for weights in callback.inside[1:]:
        if weights != runs[-1]:
            runs.append(weights)
    assert len(runs) == 4  # one change per step, none inside a closure
    losses = module.losses(x[0])
    expected = norms_by_hand(module.trunk[2].weight, losses.values())
    torch.testing.assert_close(callback.norms[0].float(), expected)


class Inner(L.Callback):
    """Everything a user may do to a module in mid-training."""

    def on_before_backward(self, trainer, pl_module, loss):
        copied = copy.deepcopy(pl_module)
        assert copied._loss_balancing is None
        assert torch.equal(copied.trunk[0].weight, pl_module.trunk[0].weight)


@pytest.mark.feature("`deepcopy` of the module while training", "supported", "the copy has the weights and no graph")
def test_a_deep_copy_in_mid_step_has_the_weights_and_no_graph(tmp_path):
    class First(Watch):
        pass

    x, module = torch.randn(3, 8, 6), OnTensors()
    quiet_trainer(tmp_path, callbacks=[Inner(), First()]).fit(module, loader(x))


# -- strategies ---------------------------------------------------------------------------------------------------------


@pytest.mark.feature(
    "`FSDPStrategy`, tensor parallelism, DeepSpeed and other strategies",
    "refused",
    "“tested with one device, with DDP, and with FSDP2 …; not with …”; `untested_strategies=True` is the way past it",
)
def test_untested_strategies_are_refused_early_with_a_way_past(tmp_path):
    from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy

    class Sharded(SingleDeviceStrategy):
        pass

    class Other(Strategy):
        for name in Strategy.__abstractmethods__:
            locals()[name] = None

    with pytest.raises(ValueError, match=r"not with Other\. Use one of these; or try it with untested_strategies=True"):
        check_strategy(Other(), "GradNormCallback", untested=False)
    check_strategy(Other(), "GradNormCallback", untested=True)
    callback = GradNormCallback(summary=False)
    train(tmp_path, OnTensors(), loader(torch.randn(2, 8, 6)), callback, strategy=Sharded(device="cpu"))
    assert callback.balancer.steps == 2
