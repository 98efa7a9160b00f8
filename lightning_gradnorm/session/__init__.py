"""The core of a balanced training run, which has never heard of a Trainer: any loop can drive it."""

from lightning_gradnorm.reading import Engine
from lightning_gradnorm.session.link import TotalLink
from lightning_gradnorm.session.loop import BalancedStep, Loop
from lightning_gradnorm.session.ranks import RankAgreement
from lightning_gradnorm.session.session import BalancingSession
from lightning_gradnorm.session.shared import NormOf

__all__ = ["BalancedStep", "BalancingSession", "Engine", "Loop", "NormOf", "RankAgreement", "TotalLink"]
