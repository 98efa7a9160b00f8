"""TensorBoard's Custom Scalars page in a real browser, on a run of the digits: the charts are there, and curves on them."""

import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import lightning as L
import pytest
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_gradnorm import GradNormCallback

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# chart → curves on it, of three tasks: norms with targets and ratios with rates are two per task
CHARTS = {
    "loss weights": 3,
    "weighted gradient norms and their targets": 6,
    "loss ratios and inverse rates": 6,
    "task losses": 3,
    "gradient cosines": 3,
    "total loss": 2,
}
# Heading, matching tags and drawn lines of every chart: TensorBoard's elements keep theirs in shadow trees.
LOOK = """
const found = [];
const inside = (node, wanted, out) => {
  if (node.shadowRoot) inside(node.shadowRoot, wanted, out);
  for (const child of node.children || []) { if (wanted(child)) out.push(child); inside(child, wanted, out); }
  return out;
};
for (const card of inside(document.body, n => n.tagName === "TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD", [])) {
  const heading = inside(card, n => n.tagName === "TF-CARD-HEADING", [])[0];
  const lines = inside(card, n => n.tagName === "path" && (n.getAttribute("d") || "").split("L").length > 3
                                 && getComputedStyle(n).fill === "none", []);
  found.push([heading.displayName || heading.innerText, new Set(lines.map(n => n.getAttribute("d"))).size]);
}
return found;
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None, reason="no Chromium: apt-get install chromium chromium-driver to look at the page"
    ),
]


@pytest.fixture(scope="module")
def log_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the digits example's module."""
    folder = tmp_path_factory.mktemp("logs")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
        problem = importlib.import_module("digits_problem")
        trainer = L.Trainer(
            max_epochs=6,
            accelerator="cpu",
            logger=TensorBoardLogger(folder, name="digits", version="run"),
            log_every_n_steps=11,
            callbacks=[GradNormCallback(alpha=0.25, summary=False)],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(problem.Digits(), problem.DigitsData())
    sys.modules.pop("digits_problem", None)
    return folder


@pytest.fixture(scope="module")
def address(log_folder: Path) -> Iterator[str]:
    """Of a real TensorBoard process on that run."""
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(log_folder), "--port", "0", "--load_fast=false"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    said = []
    for line in server.stderr:
        said.append(line)
        if "http://" in line:
            yield next(word for word in line.split() if word.startswith("http://"))
            break
    else:
        pytest.fail("TensorBoard did not start: " + "".join(said))
    server.kill()
    server.stderr.close()
    server.wait()


def test_the_custom_scalars_page_shows_every_chart_with_its_curves(address, tmp_path):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1500,900"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        browser.get(f"{address.rstrip('/')}/#custom_scalars")
        twice = {chart: 2 * curves for chart, curves in CHARTS.items()}  # as they are, and smoothed
        WebDriverWait(browser, 90, poll_frequency=1).until(lambda b: dict(b.execute_script(LOOK)) == twice)
        assert browser.save_screenshot(str(tmp_path / "page.png"))
    except Exception as error:
        pytest.fail(f"{error}; on the page: {browser.execute_script(LOOK)}")
    finally:
        browser.quit()
    assert (tmp_path / "page.png").stat().st_size > 20_000
