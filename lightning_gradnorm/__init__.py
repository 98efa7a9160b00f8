"""lightning-gradnorm: balance the losses of multi-task models and physics-informed networks in PyTorch Lightning."""

from lightning_gradnorm.balancers import GradNorm, LossBalancer
from lightning_gradnorm.callbacks import GradNormCallback, LossBalancingCallback
from lightning_gradnorm.gradients import JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.mixin import MultiTaskMixin

__version__ = "0.1.0"

__all__ = [
    "GradNorm",
    "GradNormCallback",
    "JointBackward",
    "LossBalancer",
    "LossBalancingCallback",
    "Measurement",
    "MultiTaskMixin",
    "PerTaskBackward",
    "tap_losses",
]
