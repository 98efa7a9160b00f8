"""Loss balancers: one method per file, behind one contract."""

from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.gradnorm import GradNorm

__all__ = ["GradNorm", "LossBalancer"]
