"""# Three tasks on one image

A photograph of a handwritten digit asks for three things: which digit it is, the image itself through a narrow code,
and how much ink is on it. One trunk serves all three, and each loss comes in the unit of its data. This page trains
the network with equal weights, looks at the gradients, and trains it with GradNorm.

Run it: `python docs/tutorials/images.py`, a minute on one core; with `--quick` some seconds, to see that it runs.
"""

import sys
import warnings

import lightning as L
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import FixedWeights, GradNormCallback, LossBalancingCallback, MultiTaskMixin, diagnose

QUICK = "--quick" in sys.argv
warnings.filterwarnings("ignore", ".*(does not have many workers|LeafSpec)")

# %%
# ## The data
#
# 1,797 images of 8 × 8 pixels from 0 to 16. The first 1,347 are learnt from, the others judged by.

pictures, digits = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
pictures = pictures.float()
learnt = TensorDataset(pictures[:1347], digits[:1347])
held_pictures, held_digits = pictures[1347:], digits[1347:]

# %%
# ## The module
#
# A trunk down to sixteen numbers, and a head per task. Nothing is scaled: the cross-entropy starts near 2, the squared error
# of a pixel near 20, that of the ink in the thousands. The mixin's `total_loss` takes the place of their sum.


class Pictures(MultiTaskMixin, L.LightningModule):
    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 16), nn.ReLU())
        self.digit, self.ink = nn.Linear(16, 10), nn.Linear(16, 1)
        self.pixels = nn.Sequential(nn.Linear(16, 128), nn.ReLU(), nn.Linear(128, 64))
        nn.init.constant_(self.ink.bias, float(learnt.tensors[0].sum(1).mean()))  # or all it learns at first is the mean

    def forward(self, images):
        code = self.trunk(images / 16)
        return self.digit(code), self.pixels(code), self.ink(code).squeeze(1)

    def training_step(self, batch, batch_idx):
        images, labels = batch
        scores, pixels, ink = self(images)
        return self.total_loss(
            {
                "digit": F.cross_entropy(scores, labels),
                "pixels": F.mse_loss(pixels, images),
                "ink": F.mse_loss(ink, images.sum(1)),
            }
        )

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=3e-3)


# %%
# ## Is weighting needed?
#
# `diagnose` trains a copy for twenty steps with equal weights, and looks at each task's gradient on the layer that all share.

torch.manual_seed(0)
print(diagnose(Pictures(), DataLoader(learnt, batch_size=64, shuffle=True)))

# %%
# It is: the ink decides what the trunk learns, and the digit has next to nothing to say. That two of the tasks pull against
# each other is worth knowing, and no reason yet to give up: both have had too little of the trunk so far.
#
# ## Training, three ways
#
# The same start, the same batches; the callback is all that differs.


def trained(callbacks):
    torch.manual_seed(0)
    module = Pictures()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(max_epochs=2 if QUICK else 60, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, DataLoader(learnt, batch_size=64, shuffle=True))
    return module


@torch.no_grad()
def judged(module):
    scores, pixels, ink = module(held_pictures)
    right = (scores.argmax(1) == held_digits).float().mean()
    errors = F.mse_loss(pixels, held_pictures).sqrt(), F.mse_loss(ink, held_pictures.sum(1)).sqrt()
    return f"digit {right:.1%} right, pixels {errors[0]:.2f} off, ink {errors[1]:.2f} off"


callback = GradNormCallback(summary=False)
print("equal weights:  ", judged(trained([])))
print("GradNorm:       ", judged(trained([callback])))

# %%
# ## The weights
#
# They are the callback's own, by name. Their mean over the training is what `FixedWeights` takes to train once more, at the
# cost of a plain sum: the paper calls it GradNorm static.

print("weights:        ", {task: float(f"{weight:.3g}") for task, weight in callback.weights.items()})
print("fixed at the mean:", judged(trained([LossBalancingCallback(FixedWeights(callback.mean_weights), summary=False)])))

# %%
# ## What to take from it
#
# The ink's loss is the largest because ink is counted in hundreds, and equal weights have the trunk serve it. Under GradNorm
# the digits and the pixels are learnt far better, and the ink a little worse: nothing comes for free when sixteen numbers
# have to serve three tasks. On several seeds, with every method: [the comparison](../comparison.md); with the curves:
# [`examples/digits.py`](../../examples/digits.py).
