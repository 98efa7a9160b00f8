"""Monitoring changes no training, whatever the method's weights depend on."""

import pytest
import torch

from lightning_gradnorm import EqualWeights, LossBalancingCallback
from tests.callbacks.test_every_method import METHODS, module_for
from tests.helpers import batches, quiet_trainer


def parameters_after(tmp_path, make, **settings):
    torch.manual_seed(0)
    module = module_for(make)
    callback = LossBalancingCallback(make() if settings else EqualWeights(), summary=False, **settings)
    quiet_trainer(tmp_path, callbacks=[callback], max_epochs=2).fit(module, batches(4))
    return torch.cat([parameter.detach().flatten() for parameter in module.parameters()])


@pytest.mark.parametrize("name", ["DB-MTL", "UW-SO", "GO4Align", "geometric", "STCH", "UPGrad", "AMNL", "GradNorm"])
def test_a_monitored_run_is_trained_as_without(tmp_path, name):
    found = parameters_after(tmp_path, METHODS[name], mode="monitor")
    torch.testing.assert_close(found, parameters_after(tmp_path, METHODS[name]), rtol=1e-6, atol=1e-7)
