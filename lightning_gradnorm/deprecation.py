"""What is to go in the next version, told where it was written."""

import sys
import warnings

PACKAGE = __name__.partition(".")[0]


def warn_deprecated(message: str) -> None:
    """A ``FutureWarning`` that points to the line outside this package.

    Args:
        message: what is going, and what to write instead.
    """
    level, frame = 2, sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == PACKAGE and frame.f_back is not None:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, FutureWarning, stacklevel=level)
