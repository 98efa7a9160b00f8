"""lightning-gradnorm: balance the losses of multi-task models and physics-informed networks in PyTorch Lightning."""

import importlib.util
from typing import TYPE_CHECKING, Any

from lightning_gradnorm.short_names import load_with_lightning_cli

if TYPE_CHECKING:
    from lightning_gradnorm.balancers import (
        AdaptiveNormalizedLoss,
        CoVWeighting,
        DualBalancing,
        DynamicTaskPrioritization,
        DynamicWeightAverage,
        EqualWeights,
        FixedWeights,
        GeometricLoss,
        GO4Align,
        GradNorm,
        GramianWeighting,
        LearningRateAnnealing,
        LossBalancer,
        LossRatioBalancing,
        NTKWeighting,
        RandomLossWeighting,
        ReLoBRaLo,
        RuleBalancer,
        ScalarizerBalancer,
        SoftAdapt,
        SoftOptimalUncertainty,
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
    "CoVWeighting",
    "DualBalancing",
    "DynamicTaskPrioritization",
    "DynamicWeightAverage",
    "EqualWeights",
    "FixedWeights",
    "GO4Align",
    "GeometricLoss",
    "GradNorm",
    "GradNormCallback",
    "GradientNormPoints",
    "GramianWeighting",
    "JointBackward",
    "LayerWatch",
    "LearningRateAnnealing",
    "Loop",
    "LossBalancer",
    "LossBalancingCallback",
    "LossRatioBalancing",
    "Measurement",
    "MultiTaskMixin",
    "NTKWeighting",
    "PerTaskBackward",
    "PointWeighting",
    "RandomLossWeighting",
    "RankAgreement",
    "ReLoBRaLo",
    "ResidualAttentionPoints",
    "RuleBalancer",
    "ScalarizerBalancer",
    "SelfAdaptivePoints",
    "SharedLayerSpec",
    "SoftAdapt",
    "SoftOptimalUncertainty",
    "UncertaintyWeighting",
    "UniformPoints",
    "compare",
    "diagnose",
    "tap_losses",
    "total_loss",
]

# What is asked for is loaded then, with torch and Lightning as it needs them: the command's help and its report need neither.
_NAMES_OF = {
    "callbacks": ("GradNormCallback", "LossBalancingCallback"),
    "comparison": ("compare",),
    "diagnosis": ("diagnose",),
    "door": ("total_loss",),
    "gradients": ("JointBackward", "PerTaskBackward", "tap_losses"),
    "layer_watch": ("LayerWatch",),
    "measurement": ("Measurement",),
    "mixin": ("MultiTaskMixin",),
    "pointwise": ("GradientNormPoints", "PointWeighting", "ResidualAttentionPoints", "SelfAdaptivePoints", "UniformPoints"),
    "session": ("BalancedStep", "BalancingSession", "Loop", "RankAgreement"),
    "shared_layer": ("SharedLayerSpec",),
}
# All the others are methods.
_ROOM_OF = dict.fromkeys(__all__, "balancers") | {name: room for room, names in _NAMES_OF.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _ROOM_OF:
        value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"{__name__}.{name}") is not None:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOM_OF.values()})


load_with_lightning_cli()
