"""What goes wrong beside a fit is told, and the fit goes on."""

import contextlib
from collections.abc import Iterator

from lightning_gradnorm.callbacks.lightning_api import rank_zero_warn


@contextlib.contextmanager
def telling(what: str, consequence: str) -> Iterator[None]:
    """An exception becomes a warning: a fit that has gone well has gone well.

    Args:
        what: went wrong, a clause.
        consequence: of it, a sentence.
    """
    try:
        yield
    except Exception as error:
        rank_zero_warn(f"{what}: {type(error).__name__}: {error}. {consequence}")
