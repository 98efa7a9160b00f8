"""What a task may be called, and how its name becomes a tag."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import summary

from lightning_gradnorm.losses import check_losses
from lightning_gradnorm.task_names import check_task_names, task_tag

# one line of printable text without space or slash at its ends
NAMES = st.text(st.characters(codec="utf-8"), min_size=1, max_size=20).filter(
    lambda name: name.isprintable() and name == name.strip("/ ") and "/dataloader_idx_" not in name
)


def loss() -> torch.Tensor:
    return torch.tensor(2.0, requires_grad=True) * 1.0


BAD_NAMES = [
    pytest.param(3, TypeError, r"name is a string, got 3 \(int\)", id="a number"),
    pytest.param(None, TypeError, r"name is a string, got None \(NoneType\)", id="None"),
    pytest.param(("a", "b"), TypeError, r"name is a string, got \('a', 'b'\) \(tuple\)", id="a tuple"),
    pytest.param("", ValueError, "not empty", id="empty"),
    pytest.param("   ", ValueError, "not empty", id="spaces"),
    pytest.param("//", ValueError, "not empty", id="slashes"),
    pytest.param("a\nb", ValueError, "one line of printable characters", id="newline"),
    pytest.param("a\tb", ValueError, "printable characters", id="tab"),
    pytest.param("a\x00", ValueError, "printable characters", id="null byte"),
    pytest.param("\ud800", ValueError, "printable characters", id="half a surrogate pair"),
    pytest.param(" depth", ValueError, "no space or slash at its ends", id="leading space"),
    pytest.param("depth ", ValueError, "no space or slash at its ends", id="trailing space"),
    pytest.param("/depth", ValueError, "no space or slash at its ends", id="leading slash"),
    pytest.param("depth/", ValueError, "no space or slash at its ends", id="trailing slash"),
    pytest.param("depth/dataloader_idx_0", ValueError, "without '/dataloader_idx_'", id="Lightning's own suffix"),
]


@pytest.mark.parametrize(("name", "error", "words"), BAD_NAMES)
def test_a_name_that_cannot_be_a_tag_is_refused(name, error, words):
    for check in (task_tag, lambda name: check_task_names(["fine", name]), _as_losses):
        with pytest.raises(error, match=words) as caught:
            check(name)
        assert repr(name) in str(caught.value)


def _as_losses(name):
    return check_losses({"fine": loss(), name: loss()}, differentiable=True)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["a", "b", "a"], r"Two tasks with one name: 'a' twice\. Give every task a name of its own"),
        (["a b", "a_b"], r"'a_b' and 'a b' \(both are 'a_b' in a logger's tag\)"),
        (["u(x)", "v", "u[x]"], r"'u\[x\]' and 'u\(x\)' \(both are 'u_x_' in a logger's tag\)"),
    ],
)
def test_two_names_for_one_tag_are_refused(names, words):
    with pytest.raises(ValueError, match=words):
        check_task_names(names)
    with pytest.raises(ValueError, match=words):
        check_losses([(name, loss()) for name in names], differentiable=True)


@given(NAMES)
def test_any_printable_name_becomes_a_tag_that_no_writer_changes(name):
    tag = task_tag(name)
    assert len(tag) == len(name)
    assert all(a == b or b == "_" for a, b in zip(name, tag, strict=True))
    assert re.fullmatch(r"[-/\w.]+", tag), "tensorboardX, and MLflow likewise, allow no other characters"
    assert task_tag(tag) == tag
    assert summary.scalar(f"loss_weight/{tag}", 1.0).value[0].tag == f"loss_weight/{tag}"
    assert list(check_losses({name: loss()}, differentiable=True)) == [name]


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("depth", "depth"),
        ("Tiefe/größe-2.5", "Tiefe/größe-2.5"),
        ("a b", "a_b"),
        ("∂u/∂x", "_u/_x"),
        ("温度", "温度"),
        ("🙂", "_"),
    ],
)
def test_the_tag_of_a_name(name, tag):
    assert task_tag(name) == tag
