"""The sheet that a figure is drawn on, laid out in inches: exact, and several times faster than layouts that are solved for."""

import contextlib
import importlib.util
import io
import warnings
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

DPI = 120
_FONTS = ("font.family", "font.sans-serif", "font.serif", "font.monospace", "font.cursive", "font.fantasy")
LEFT, BOTTOM = 0.62, 0.4  # inches: what the axes' numbers take


class Picture(NamedTuple):
    """A figure that has been drawn.

    Attributes:
        png: the content of a PNG file.
        pixels: the same, shape ``[height, width, 4]`` (red, green, blue, opacity), bytes.
    """

    png: bytes
    pixels: memoryview

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the pixels."""
        return self.pixels.shape or ()


class Sheet:
    """A white sheet, without pyplot, whose state is the user's.

    Raises:
        ImportError: where matplotlib is not installed.
    """

    def __init__(self) -> None:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        self.figure: Any = Figure(dpi=DPI, facecolor="white")
        self._canvas: Any = FigureCanvasAgg(self.figure)
        self.width: float = 0.0
        self.height: float = 0.0

    def resize(self, width: float, height: float) -> None:
        """In inches."""
        self.width = width
        self.height = height
        self.figure.set_size_inches(width, height)

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        """A panel with its lower left corner there."""
        return self.figure.add_axes((x / self.width, y / self.height, width / self.width, height / self.height))

    def heading(self, title: str) -> None:
        """A line above all panels."""
        if title:
            self.figure.text(
                LEFT / self.width, 1 - 0.16 / self.height, title,
                fontsize=12, fontweight="bold", va="top", color="0.1", parse_math=False,
            )  # fmt: skip

    def caption(self, text: str, x: float, y: float) -> None:
        """A line above a column of panels."""
        at = x / self.width, y / self.height
        self.figure.text(*at, text, fontsize=10, fontweight="bold", va="bottom", color="0.1", parse_math=False)

    def note(self, text: str, x: float = LEFT) -> None:
        """A line below them, in small print."""
        at = x / self.width, 0.06 / self.height
        self.figure.text(*at, text, fontsize=8, color="0.4", va="bottom", parse_math=False)

    def width_of(self, names: Iterable[str], size: float) -> float:
        """Of the longest, in inches, with letters of so many points."""
        from matplotlib.font_manager import FontProperties

        font, renderer = FontProperties(size=size), self._canvas.get_renderer()
        with _quiet():
            return max((renderer.get_text_width_height_descent(name, font, False)[0] for name in names), default=0.0) / DPI

    def rendered(self) -> Picture:
        """What it comes to, drawn once."""
        content = io.BytesIO()
        with _quiet():
            self._canvas.print_png(content)
        return Picture(content.getvalue(), self._canvas.buffer_rgba())


def can_draw() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def cut(name: str, most: int) -> str:
    """So many letters of it at most, of either end."""
    return name if len(name) <= most else f"{name[: (most + 1) // 2]}…{name[-(most // 2) + 1 :]}"


@contextlib.contextmanager
def in_plain_style() -> Iterator[None]:
    """Matplotlib as it comes, whatever the user has set for figures of his own; his fonts alone, which may have more letters.

    Raises:
        ImportError: where matplotlib is not installed.
    """
    import matplotlib
    from matplotlib import style

    settings: Any = matplotlib.rcParams
    fonts = {name: settings[name] for name in _FONTS}
    with style.context("default"):
        settings.update(fonts)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """A name in a script that the font has not is drawn as boxes; an axis over 300 decades looks for ticks beyond its end."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        warnings.filterwarnings("ignore", "overflow encountered", RuntimeWarning)
        yield
