"""A recipe's numbers are those that were measured."""

import json
from pathlib import Path

import pytest

from benchmarks.clients.measure import RESULTS, table

RECIPES = Path(__file__).parents[1] / "docs" / "recipes"
MEASURED = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(RESULTS.glob("*.json"))}


def test_something_was_measured():
    assert MEASURED


@pytest.mark.parametrize("name", [name for name, record in MEASURED.items() if "fits" in record])
def test_a_recipe_quotes_the_table_of_its_results(name):
    pages = [page.read_text(encoding="utf-8") for page in RECIPES.glob("*.md")]
    assert any(table(MEASURED[name]) in page for page in pages), f"no recipe has the table of results/{name}.json"
