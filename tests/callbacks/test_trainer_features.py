"""Each Trainer feature against the same run without it, or against a loop written by hand."""

import copy

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.plugins import MixedPrecision
from torch import nn
from torch.utils.data import DataLoader

from lightning_gradnorm import GradNormCallback
from lightning_gradnorm.callbacks.refusals import check_strategy
from tests.helpers import SCALES, TrunkAndHeads, quiet_trainer

TASKS = list(SCALES)


class Watch(GradNormCallback):
    """Remembers, per optimiser step, the weights that it applied and the norms of the unweighted gradients."""

    def __init__(self, **settings):
        super().__init__(**({"lr": 0.1, "summary": False} | settings))
        self.applied, self.norms, self.inside = [], [], []

    def on_before_backward(self, trainer, pl_module, loss):
        super().on_before_backward(trainer, pl_module, loss)
        self.inside.append(self.weights)

    def on_train_batch_end(self, trainer, *args):
        before, steps = self.balancer.weights_for(TASKS), self.balancer.steps
        super().on_train_batch_end(trainer, *args)
        if self.balancer.steps > steps:
            self.applied.append(before)
            shown = self.balancer.diagnostics.get("grad_norm")
            self.norms.append(None if shown is None else shown / before)


def train(tmp_path, module, data, callback=None, **settings):
    callback = callback or Watch()
    quiet_trainer(tmp_path, callbacks=[callback, *settings.pop("callbacks", [])], **settings).fit(module, data)
    return callback


def assert_same_history(one, other, rtol=1e-5):
    assert len(one.applied) == len(other.applied) > 2
    torch.testing.assert_close(torch.stack(one.applied), torch.stack(other.applied), rtol=rtol, atol=0)
    torch.testing.assert_close(torch.stack(one.norms), torch.stack(other.norms), rtol=rtol, atol=0)
    assert one.weights == pytest.approx(other.weights, rel=rtol)


def norms_by_hand(parameter, losses):
    return torch.stack([torch.autograd.grad(loss, parameter, retain_graph=True)[0].norm() for loss in losses])


def loader(x):
    return DataLoader(list(x), batch_size=None)


class OnTensors(TrunkAndHeads):
    def training_step(self, batch, batch_idx):
        return self.total_loss(self.losses(batch))


# -- accumulation ------------------------------------------------------------------------------------------------------


@pytest.mark.feature(
    "`accumulate_grad_batches=N`",
    "supported",
    "one update per optimiser step, from the norm of the mean gradient: equal to one batch N times as large",
)
def test_accumulation_equals_one_batch_n_times_as_large(tmp_path):
    x, module = torch.randn(6, 12, 6), OnTensors()
    large = train(tmp_path, copy.deepcopy(module), loader(x))
    small = train(tmp_path, copy.deepcopy(module), loader(x.view(18, 4, 6)), accumulate_grad_batches=3)
    assert_same_history(small, large)


@pytest.mark.feature("`accumulate_grad_batches=N`", "supported", "the weights are constant inside the window")
def test_weights_are_constant_inside_the_window(tmp_path):
    callback = train(tmp_path, OnTensors(), loader(torch.randn(8, 4, 6)), accumulate_grad_batches=4)
    assert callback.inside[:4] == [callback.inside[0]] * 4
    assert callback.inside[4:] == [callback.inside[4]] * 4
    assert callback.inside[0] != callback.inside[4]


@pytest.mark.feature("a last short accumulation window", "supported", "its norms are its own")
def test_a_last_short_window_is_measured_as_what_it_is(tmp_path):
    """5 batches in twos: the last one alone. Its norms are its own, though Lightning divides its loss by two."""
    x, module = torch.randn(5, 4, 6), OnTensors(lr=0.0)
    callback = train(tmp_path, module, loader(x), accumulate_grad_batches=2)
    assert len(callback.norms) == 3
    expected = norms_by_hand(module.trunk[2].weight, module.losses(x[4]).values())
    torch.testing.assert_close(callback.norms[2].float(), expected)


@pytest.mark.feature("`GradientAccumulationScheduler`", "supported")
def test_accumulation_scheduler(tmp_path):
    x, module = torch.randn(4, 4, 6), OnTensors(lr=0.0)
    callback = train(tmp_path, module, loader(x), callbacks=[GradientAccumulationScheduler({0: 1, 1: 4})], max_epochs=2)
    assert len(callback.norms) == 5
    expected = norms_by_hand(module.trunk[2].weight, module.losses(x.reshape(16, 6)).values())
    torch.testing.assert_close(callback.norms[4].float(), expected)


@pytest.mark.feature('`norm_of="features"` with accumulation', "supported")
def test_features_accumulate_as_one_batch_too(tmp_path):
    class Named(OnTensors):
        def shared_layer(self):
            return "trunk.2"

    x, module = torch.randn(6, 12, 6), Named()
    large = train(tmp_path, copy.deepcopy(module), loader(x), Watch(norm_of="features"))
    small = train(
        tmp_path, copy.deepcopy(module), loader(x.view(18, 4, 6)), Watch(norm_of="features"), accumulate_grad_batches=3
    )
    assert_same_history(small, large)
    z = module.trunk[:3](x[0])
    losses = [
        SCALES[task] * (head(z.tanh()) - (k + 1) * x[0][:, :2]).pow(2).mean()
        for k, (task, head) in enumerate(module.heads.items())
    ]
    expected = norms_by_hand(z, losses)
    torch.testing.assert_close(large.norms[0].float(), expected)


@pytest.mark.feature(
    "`nn.ReLU(inplace=True)` right after the shared layer",
    "supported",
    "what is read is the gradient at the layer's own output",
)
@pytest.mark.parametrize("norm_of", ["parameters", "features"])
def test_an_activation_in_place_changes_no_norm(tmp_path, norm_of):
    class Rectified(OnTensors):
        def __init__(self, inplace):
            super().__init__()
            self.trunk[3] = nn.ReLU(inplace=inplace)

        def shared_layer(self):
            return self.trunk[2]

    x, module = torch.randn(6, 2, 6), Rectified(inplace=False)
    in_place = Rectified(inplace=True)
    in_place.load_state_dict(module.state_dict())
    expected = train(tmp_path, module, loader(x), Watch(norm_of=norm_of))
    assert_same_history(train(tmp_path, in_place, loader(x), Watch(norm_of=norm_of)), expected)


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
