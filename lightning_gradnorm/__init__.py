"""lightning-gradnorm: balance the losses of multi-task models and physics-informed networks in PyTorch Lightning."""

from lightning_gradnorm.balancers import (
    AdaptiveNormalizedLoss,
    DynamicTaskPrioritization,
    DynamicWeightAverage,
    EqualWeights,
    FixedWeights,
    GeometricLoss,
    GradNorm,
    LearningRateAnnealing,
    LossBalancer,
    LossRatioBalancing,
    RandomLossWeighting,
    ReLoBRaLo,
    RuleBalancer,
    SoftAdapt,
    UncertaintyWeighting,
)
from lightning_gradnorm.callbacks import GradNormCallback, LossBalancingCallback
from lightning_gradnorm.comparison import compare
from lightning_gradnorm.diagnosis import diagnose
from lightning_gradnorm.door import total_loss
from lightning_gradnorm.gradients import JointBackward, PerTaskBackward, tap_losses
from lightning_gradnorm.layer_watch import LayerWatch
from lightning_gradnorm.measurement import Measurement
from lightning_gradnorm.mixin import MultiTaskMixin
from lightning_gradnorm.pointwise import (
    GradientNormPoints,
    PointWeighting,
    ResidualAttentionPoints,
    SelfAdaptivePoints,
    UniformPoints,
)
from lightning_gradnorm.session import BalancedStep, BalancingSession, Loop, RankAgreement
from lightning_gradnorm.shared_layer import SharedLayerSpec

__version__ = "0.2.0.dev0"

__all__ = [
    "AdaptiveNormalizedLoss",
    "BalancedStep",
    "BalancingSession",
    "DynamicTaskPrioritization",
    "DynamicWeightAverage",
    "EqualWeights",
    "FixedWeights",
    "GeometricLoss",
    "GradNorm",
    "GradNormCallback",
    "GradientNormPoints",
    "JointBackward",
    "LayerWatch",
    "LearningRateAnnealing",
    "Loop",
    "LossBalancer",
    "LossBalancingCallback",
    "LossRatioBalancing",
    "Measurement",
    "MultiTaskMixin",
    "PerTaskBackward",
    "PointWeighting",
    "RandomLossWeighting",
    "RankAgreement",
    "ReLoBRaLo",
    "ResidualAttentionPoints",
    "RuleBalancer",
    "SelfAdaptivePoints",
    "SharedLayerSpec",
    "SoftAdapt",
    "UncertaintyWeighting",
    "UniformPoints",
    "compare",
    "diagnose",
    "tap_losses",
    "total_loss",
]
