"""Every public name is on a page of the API reference, and its docstring says what it takes."""

import inspect
import re
from pathlib import Path

import pytest

import lightning_gradnorm
from lightning_gradnorm import GradNorm, GradNormCallback, LossBalancingCallback
from tests.public_names import described, parameters, public

PAGES = Path(__file__).parents[1] / "docs" / "api"
PUBLIC = dict(public())


def test_the_reference_has_every_public_name_once():
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES.glob("*.md"))
    listed = re.findall(
        r"^\.\. auto(?:class|function|data):: lightning_gradnorm\.(?:[a-z_]+\.)*(\w+)$", text, flags=re.MULTILINE
    )
    assert [name for name in lightning_gradnorm.__all__ if listed.count(name) != 1] == []


@pytest.mark.parametrize("name", [name for name in PUBLIC if name != "SharedLayerSpec"])
def test_a_docstring_says_what_is_taken(name):
    named = PUBLIC[name]
    docstring = inspect.getdoc(named)
    assert docstring
    if callable(named):
        holds_fields = inspect.isclass(named) and (issubclass(named, tuple) or hasattr(named, "__dataclass_fields__"))
        assert described(docstring, "Attributes" if holds_fields else "Args") == parameters(named)


@pytest.mark.parametrize(
    "name", sorted(set(lightning_gradnorm.balancers.__all__) - {"EqualWeights", "LossBalancer", "RuleBalancer"})
)
def test_a_method_says_where_it_is_from(name):
    assert re.search(r"^Source: \S+", inspect.getdoc(PUBLIC[name]), flags=re.MULTILINE)


def test_gradnorms_callback_takes_what_the_method_and_the_callback_take():
    takes = set(parameters(GradNormCallback))
    assert takes == set(parameters(GradNorm)) | set(parameters(LossBalancingCallback)) - {"balancer"}


def test_what_a_docstring_leaves_out_is_found():
    text = (
        "A thing.\n\nArgs:\n    one: of these,\n        not: this.\n    two, three: more.\n\nRaises:\n    ValueError: never.\n"
    )
    assert described(text, "Args") == ["one", "two", "three"]
    assert described(text, "Attributes") == []
