"""TensorBoard's pages in a real browser, on a run of the digits: the charts are there, curves on them, and the figure."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "docs" / "make_screenshots.py"
SPEC = importlib.util.spec_from_file_location("make_screenshots", PATH)
shots = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(shots)

# chart → curves on it, of three tasks: norms with targets and ratios with rates are two per task
CHARTS = {
    "loss weights": 3,
    "weighted gradient norms and their targets": 6,
    "loss ratios and inverse rates": 6,
    "task losses": 3,
    "gradient cosines": 3,
    "total loss": 2,
}
# Heading, matching tags and drawn lines of every chart.
LOOK = (
    shots.INSIDE
    + """
const found = [];
for (const card of inside(document.body, n => n.tagName === "TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD", [])) {
  const heading = inside(card, n => n.tagName === "TF-CARD-HEADING", [])[0];
  const lines = inside(card, n => n.tagName === "path" && (n.getAttribute("d") || "").split("L").length > 3
                                 && getComputedStyle(n).fill === "none", []);
  found.push([heading.displayName || heading.innerText, new Set(lines.map(n => n.getAttribute("d"))).size]);
}
return found;
"""
)
# Width and height of every picture that has come.
PICTURES = (
    shots.INSIDE
    + """
return inside(document.body, n => n.tagName === "IMG" && n.naturalWidth > 300, []).map(n => [n.naturalWidth, n.naturalHeight]);
"""
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        shots.CHROMIUM is None or shots.DRIVER is None,
        reason="no Chromium: apt-get install chromium chromium-driver to look at the page",
    ),
]


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Of a real TensorBoard process on a run of the digits."""
    folder = tmp_path_factory.mktemp("logs")
    shots.train(folder, epochs=6, summary=True, alpha=0.25)
    with shots.tensorboard(folder) as address:
        yield address


def test_the_custom_scalars_page_shows_every_chart_with_its_curves(address, tmp_path):
    with shots.browser() as window:
        window.get(f"{address}/#custom_scalars")
        twice = {chart: 2 * curves for chart, curves in CHARTS.items()}  # as they are, and smoothed
        try:
            shots.wait(window, lambda b: dict(b.execute_script(LOOK)) == twice)
        except Exception as error:
            pytest.fail(f"{error}; on the page: {window.execute_script(LOOK)}")
        assert window.save_screenshot(str(tmp_path / "page.png"))
        assert window.execute_script(shots.PRESS, list(CHARTS)) == len(CHARTS), "each has the button that the docs name"
    assert (tmp_path / "page.png").stat().st_size > 20_000


def test_the_images_page_shows_the_figure(address):
    with shots.browser() as window:
        window.get(f"{address}/#images")
        shots.wait(window, lambda b: b.execute_script(PICTURES))
        (size,) = window.execute_script(PICTURES)
    assert size[0] > size[1] > 500, "as it was drawn"
