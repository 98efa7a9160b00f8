"""Loss balancers: one method per file, behind one contract."""

from lightning_gradnorm.balancers.amnl import AdaptiveNormalizedLoss
from lightning_gradnorm.balancers.annealing import LearningRateAnnealing
from lightning_gradnorm.balancers.base import LossBalancer
from lightning_gradnorm.balancers.cov_weighting import CoVWeighting
from lightning_gradnorm.balancers.db_mtl import DualBalancing
from lightning_gradnorm.balancers.dtp import DynamicTaskPrioritization
from lightning_gradnorm.balancers.dwa import DynamicWeightAverage
from lightning_gradnorm.balancers.fixed import EqualWeights, FixedWeights
from lightning_gradnorm.balancers.geometric import GeometricLoss
from lightning_gradnorm.balancers.go4align import GO4Align
from lightning_gradnorm.balancers.gradnorm import GradNorm
from lightning_gradnorm.balancers.gramian import GramianWeighting
from lightning_gradnorm.balancers.loss_ratio import LossRatioBalancing
from lightning_gradnorm.balancers.ntk import NTKWeighting
from lightning_gradnorm.balancers.random_weights import RandomLossWeighting
from lightning_gradnorm.balancers.relobralo import ReLoBRaLo
from lightning_gradnorm.balancers.rule import RuleBalancer
from lightning_gradnorm.balancers.scalarizer import ScalarizerBalancer
from lightning_gradnorm.balancers.softadapt import SoftAdapt
from lightning_gradnorm.balancers.uncertainty import UncertaintyWeighting
from lightning_gradnorm.balancers.uw_so import SoftOptimalUncertainty

__all__ = [
    "AdaptiveNormalizedLoss",
    "CoVWeighting",
    "DualBalancing",
    "DynamicTaskPrioritization",
    "DynamicWeightAverage",
    "EqualWeights",
    "FixedWeights",
    "GO4Align",
    "GeometricLoss",
    "GradNorm",
    "GramianWeighting",
    "LearningRateAnnealing",
    "LossBalancer",
    "LossRatioBalancing",
    "NTKWeighting",
    "RandomLossWeighting",
    "ReLoBRaLo",
    "RuleBalancer",
    "ScalarizerBalancer",
    "SoftAdapt",
    "SoftOptimalUncertainty",
    "UncertaintyWeighting",
]
