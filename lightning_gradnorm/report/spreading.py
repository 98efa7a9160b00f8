"""Labels beside the ends of curves: as near as they can be without one on another."""

from collections.abc import Sequence


def spread(heights: Sequence[float], gap: float, lowest: float, highest: float) -> list[float]:
    """The heights nearest to the given ones, by least squares, that are in the same order and a gap apart.

    With z_i = y_i − i · gap these are increasing numbers, so it is isotonic regression: neighbours out of order are pooled
    at their mean.

    Args:
        heights: in any order; equal ones keep theirs.
        gap: the least distance of two.
        lowest: of all of them.
        highest: likewise; where not all fit between the two, they are as far apart as they can be.

    Returns:
        As many, in the order of ``heights``.
    """
    count = len(heights)
    gap = min(gap, (highest - lowest) / max(count - 1, 1))
    order = sorted(range(count), key=heights.__getitem__)
    pools: list[tuple[float, int]] = []  # mean, how many
    for place, index in enumerate(order):
        mean, size = heights[index] - place * gap, 1
        while pools and pools[-1][0] > mean:
            other, more = pools.pop()
            mean, size = (mean * size + other * more) / (size + more), size + more
        pools.append((mean, size))
    top = highest - (count - 1) * gap
    pooled = [min(max(mean, lowest), top) for mean, size in pools for _ in range(size)]
    placed = {index: pooled[place] + place * gap for place, index in enumerate(order)}
    return [placed[index] for index in range(count)]
