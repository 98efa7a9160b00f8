"""Makes docs/images/report.png, a run's figure, and docs/images/tensorboard.png, its Custom Scalars page in a real browser.

    python docs/make_screenshots.py         # needs Chromium and its driver: apt-get install chromium chromium-driver

The run is GradNorm on the handwritten digits, forty epochs from one seed.
"""

import contextlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
# The elements of a kind, also in shadow trees, which is where TensorBoard's keep theirs.
INSIDE = """
const inside = (node, wanted, out) => {
  if (node.shadowRoot) inside(node.shadowRoot, wanted, out);
  for (const child of node.children || []) { if (wanted(child)) out.push(child); inside(child, wanted, out); }
  return out;
};
"""
# Presses the button for a logarithmic axis of every chart with one of these headings; gives how many it pressed.
PRESS = f"""{INSIDE}
let pressed = 0;
for (const card of inside(document.body, n => n.tagName === "TF-CUSTOM-SCALAR-MULTI-LINE-CHART-CARD", [])) {{
  const heading = inside(card, n => n.tagName === "TF-CARD-HEADING", [])[0];
  const button = inside(card, n => (n.title || "").includes("log scale"), [])[0];
  if (button && arguments[0].includes(heading.displayName)) {{ button.click(); pressed += 1; }}
}}
return pressed;
"""


def train(folder: Path, epochs: int = 40, *, summary: bool = True, **settings: Any) -> Path:
    """A run of the digits' module with GradNorm; gives its log folder."""
    import lightning as L
    from lightning.pytorch.loggers import TensorBoardLogger

    from lightning_gradnorm import GradNormCallback

    sys.path.insert(0, str(ROOT / "examples"))
    try:
        from digits_problem import Digits, DigitsData
    finally:
        sys.path.pop(0)
        sys.modules.pop("digits_problem", None)
    L.seed_everything(0, verbose=False)
    quiet: dict[str, Any] = dict.fromkeys(("enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=TensorBoardLogger(folder, name="digits", version="gradnorm"),
        log_every_n_steps=11,
        callbacks=[GradNormCallback(summary=summary, **settings)],
        **quiet,
    )
    trainer.fit(Digits(), DigitsData())
    return folder / "digits" / "gradnorm"


@contextlib.contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """The address of a real TensorBoard process on a folder.

    Raises:
        RuntimeError: if it does not start.
    """
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", "0", "--load_fast=false"]
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        said = []
        for line in server.stderr:
            said.append(line)
            if "http://" in line:
                yield next(word for word in line.split() if word.startswith("http://")).rstrip("/")
                return
        raise RuntimeError("TensorBoard did not start: " + "".join(said))
    finally:
        server.kill()
        server.stderr.close()
        server.wait()


@contextlib.contextmanager
def browser(width: int = 1500, height: int = 900) -> Iterator[Any]:
    """Chromium without a screen."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        f"--window-size={width},{height}",
    ):
        options.add_argument(argument)
    window = webdriver.Chrome(options=options, service=Service(DRIVER))
    try:
        yield window
    finally:
        window.quit()


def wait(window: Any, until: Callable[[Any], object], seconds: float = 180) -> None:
    """Until that is true of the page.

    Raises:
        selenium.common.TimeoutException: if it is not by then.
    """
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(window, seconds, poll_frequency=1).until(until)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        run = train(Path(folder))
        shutil.copy(run / "loss_balancing.png", IMAGES / "report.png")
        with tensorboard(Path(folder)) as address, browser(1500, 950) as window:
            window.get(f"{address}/#custom_scalars")
            logarithmic = ["loss weights", "weighted gradient norms and their targets", "task losses", "total loss"]
            wait(window, lambda b: b.execute_script(PRESS, logarithmic) == len(logarithmic))
            time.sleep(20)  # until all curves are there
            window.save_screenshot(str(IMAGES / "tensorboard.png"))
            if len(sys.argv) > 1:  # the Images page beside it, to look at
                window.get(f"{address}/#images")
                time.sleep(20)
                window.save_screenshot(sys.argv[1])


if __name__ == "__main__":
    main()
