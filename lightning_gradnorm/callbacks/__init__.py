"""Lightning callbacks: all Trainer plumbing, once, and the named subclass for GradNorm."""

from lightning_gradnorm.callbacks.balancing import LossBalancingCallback
from lightning_gradnorm.callbacks.gradnorm import GradNormCallback

__all__ = ["GradNormCallback", "LossBalancingCallback"]
