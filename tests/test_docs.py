"""Pages that are written from the tests say what the tests say."""

import importlib.util
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def test_the_page_of_features_is_up_to_date():
    spec = importlib.util.spec_from_file_location("make_features", DOCS / "make_features.py")
    make_features = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make_features)
    assert len(make_features.rows()) > 30
    assert make_features.PAGE.read_text(encoding="utf-8") == make_features.page(), "run python docs/make_features.py"
