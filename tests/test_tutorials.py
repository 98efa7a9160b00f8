"""The tutorials run on their quick setting; what their pages say was printed is of the same lines."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))

pytestmark = pytest.mark.slow


def labels(printed: str) -> list[str]:
    """What stands before the colons: the same on every machine, however long the training."""
    return re.findall(r"^([\w ×]+):", printed, flags=re.MULTILINE)


@pytest.mark.parametrize("tutorial", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial_runs_and_prints_the_lines_of_its_page(tutorial, tmp_path):
    run = subprocess.run([sys.executable, str(tutorial), "--quick"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    shown = tutorial.with_suffix(".txt").read_text(encoding="utf-8")
    assert labels(run.stdout) == labels(shown) != []


def test_there_are_tutorials():
    assert [path.stem for path in TUTORIALS] == ["equation", "forces", "images"]
