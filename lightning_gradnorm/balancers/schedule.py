"""Which optimiser steps are measured, where not all are."""

_GOLDEN = 2654435769  # 2³² / φ, made odd
_DENSE = 100  # steps in a row that an average wants at first
_FRESH = 25  # measurements at least that it is of, later on


def is_measured(step: int, every: int) -> bool:
    """Whether the optimiser step of this number, from 0, is one of the one in ``every`` that are measured.

    The first is, and then one of each ``every`` that follow, at a place that moves from block to block by the golden ratio.
    So tasks that take turns, with whatever period, are measured in every one of their turns, and in each as often: of two
    that alternate, every n-th step, n even, would see one alone. It is a function of the step alone, the same on every
    rank and after a resume.
    """
    block, place = divmod(step - 1, every)
    return step == 0 or place == ((block + 1) * _GOLDEN % 2**32) * every >> 32


def widening(step: int, rate: float = 0.0) -> int:
    """Of how many optimiser steps one is measured at this step, for a method that averages over all of the training.

    All of the first 100, then one in 2, from step 200 one in 4, from step 400 one in 8 and so on: fifty more whenever the
    training has doubled, 430 of 10,000 steps and 530 of 40,000. It is a function of the step alone.

    Args:
        step: its number, from 0.
        rate: the share of the average, in [0, 1], that each step replaces at least. One measurement, which stands for the
            steps until the next, then replaces no more of it than where the average is over all: about a twenty-fifth.
    """
    widened: int = 1 << (step // _DENSE).bit_length()
    return widened if widened * rate * _FRESH <= 1 else max(1, int(1 / (rate * _FRESH)))
