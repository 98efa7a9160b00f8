"""What CONTRIBUTING names is there."""

import re
from pathlib import Path

import pytest

import lightning_gradnorm

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
CELLS = [line.split("|") for line in TEXT.splitlines() if line.startswith("| ")]
PATHS = sorted(set(re.findall(r"`([\w./-]+(?:/|\.py|\.toml|\.txt))`", " ".join(cell for row in CELLS for cell in row))))


def test_the_tables_name_many():
    assert len(PATHS) > 60


@pytest.mark.parametrize("path", PATHS)
def test_a_file_or_folder_of_the_tables_is_there(path):
    assert any((root / path).exists() for root in (ROOT, Path(lightning_gradnorm.__file__).parent))


def test_every_room_has_a_row():
    package = Path(lightning_gradnorm.__file__).parent
    files = {path.name for path in package.glob("*.py")} - {"__init__.py"}
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert files | folders <= set(PATHS)


@pytest.mark.parametrize("target", re.findall(r"^make ([\w-]+)", TEXT, flags=re.MULTILINE))
def test_a_command_of_the_page_is_one_of_the_makefile(target):
    assert re.search(rf"^{target}\b.*:|^floors {target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
