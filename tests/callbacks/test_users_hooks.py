"""Hooks of a user run as often in a balanced fit as without it: what finds W and proves the reading does not show."""

import pytest
import torch

from lightning_gradnorm import GradNormCallback
from tests.helpers import TrunkAndHeads, batches, quiet_trainer

CALLBACKS = {
    "found": lambda: GradNormCallback(),
    "per task": lambda: GradNormCallback(engine="per_task"),
    "every third": lambda: GradNormCallback(update_every=3),
    "monitor": lambda: GradNormCallback(mode="monitor"),
}


class Counted(TrunkAndHeads):
    """Counts every kind of hook, on every module and parameter."""

    def __init__(self):
        super().__init__()
        self.counts = {}
        for name, parameter in self.named_parameters():
            parameter.register_hook(self.counting(f"gradient of {name}"))
            parameter.register_post_accumulate_grad_hook(self.counting(f"grad of {name}"))
        for name, module in self.named_modules():
            if name and not list(module.children()):
                module.register_full_backward_hook(self.counting(f"backward of {name}"))
                module.register_forward_hook(self.counting(f"forward of {name}"))
                module.register_forward_hook(self.hook_output(name))

    def counting(self, name):
        def hook(*args):
            self.counts[name] = self.counts.get(name, 0) + 1

        return hook

    def hook_output(self, name):
        def hook(module, inputs, output):
            if output.requires_grad:
                output.register_hook(self.counting(f"output of {name}"))

        return hook


def counts_of(folder, callbacks):
    torch.manual_seed(0)
    module = Counted()
    quiet_trainer(folder, callbacks=callbacks).fit(module, batches(5))
    return module.counts


@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed with respect to module outputs")
@pytest.mark.parametrize("make", CALLBACKS.values(), ids=CALLBACKS)
def test_hooks_run_as_often_as_without_the_callback(make, tmp_path):
    expected = counts_of(tmp_path, [])
    assert counts_of(tmp_path, [make()]) == expected
    assert set(expected.values()) == {5}


def test_gradient_histograms_of_wandb(tmp_path, monkeypatch):
    """As many as without the callback, each of the same gradient."""
    wandb = pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = {}
    for name, callbacks in (("plain", []), ("balanced", [GradNormCallback(mode="monitor")])):
        drawn = seen[name] = []
        torch.manual_seed(0)
        module = TrunkAndHeads()
        with wandb.init(mode="offline", dir=tmp_path) as run:

            def draw(tensor, tag, drawn=drawn):  # wandb numbers the networks that it watches
                drawn.append((tag.replace("graph_1", ""), tensor.norm()))

            monkeypatch.setattr(run._torch, "log_tensor_stats", draw)
            run.watch(module, log="gradients", log_freq=1)
            quiet_trainer(tmp_path, callbacks=callbacks).fit(module, batches(3))
            run.unwatch(module)
    assert len(seen["plain"]) == 3 * len(list(module.parameters()))
    assert seen["balanced"] == seen["plain"]
