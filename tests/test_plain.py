"""The one door for names and numbers."""

import enum
from collections import OrderedDict
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from lightning_gradnorm.plain import flat_settings, plain_keys, plain_name, plain_names, plain_number


class Task(str, enum.Enum):
    DEPTH = "depth"


class Level(enum.IntEnum):
    TEN = 10


class Rate(float, enum.Enum):
    SLOW = 1e-3


class Bare(enum.Enum):
    DEPTH = "depth"


NUMBERS = {
    "int": (10, 10),
    "float": (1e-3, 1e-3),
    "int64": (np.int64(10), 10),
    "uint8": (np.uint8(10), 10),
    "float32": (np.float32(0.5), 0.5),
    "float64": (np.float64(1e-3), 1e-3),
    "longdouble": (np.longdouble(0.5), 0.5),
    "array": (np.array(0.5), 0.5),
    "array of int": (np.array(10), 10),
    "tensor": (torch.tensor(0.5), 0.5),
    "tensor of int": (torch.tensor(10), 10),
    "tensor with a graph": (torch.tensor(0.25, requires_grad=True) * 2, 0.5),
    "bfloat16": (torch.tensor(0.5, dtype=torch.bfloat16), 0.5),
    "IntEnum": (Level.TEN, 10),
    "float Enum": (Rate.SLOW, 1e-3),
    "fraction": (Fraction(1, 2), 0.5),
    "decimal": (Decimal("0.5"), 0.5),
    "YAML 1.1's text": ("1e-3", 1e-3),
    "and that": ("2.5E3", 2500.0),
    "and this": ("-.5e+1", -5.0),
}


@pytest.mark.parametrize(("given", "expected"), NUMBERS.values(), ids=NUMBERS)
def test_a_number_becomes_a_plain_one(given, expected):
    number = plain_number(given)
    assert number == expected and type(number) is type(expected)


NO_NUMBERS = [
    None, True, False, np.bool_(True), torch.tensor(True), np.array(False), "1", "0.5", "e3", "1e", "inf", "nan", "", b"1",
    (1,), [1], np.array([1]), torch.ones(1), 1j, np.complex64(1), Bare.DEPTH, np.datetime64("2020-01-01"), {},
]  # fmt: skip


@pytest.mark.parametrize("given", NO_NUMBERS, ids=repr)
def test_what_is_no_number(given):
    assert plain_number(given) is None


def test_numbers_that_no_float_can_hold_stay_whole():
    assert plain_number(2**70 + 1) == 2**70 + 1


NAMES = {
    "str": "depth",
    "numpy": np.str_("depth"),
    "array of numpy": np.array("depth"),
    "Enum": Task.DEPTH,
    "a column": np.array(["depth"])[0],
    "objects": np.array(["depth"], dtype=object)[0],
    "subclass": type("Name", (str,), {"__str__": lambda self: "other"})("depth"),
} | ({"StrEnum": enum.StrEnum("T", {"DEPTH": "depth"}).DEPTH} if hasattr(enum, "StrEnum") else {})


@pytest.mark.parametrize("given", NAMES.values(), ids=NAMES)
def test_a_name_becomes_a_plain_string(given):
    assert plain_name(given) == "depth" and type(plain_name(given)) is str
    assert plain_names([given]) == ("depth",) and type(plain_names([given])[0]) is str


@pytest.mark.parametrize(
    "given", [None, 3, 1.5, True, b"depth", ("a", "b"), ["a"], np.int64(3), np.array(["a"]), np.bytes_(b"a"), torch.tensor(1)]
)
def test_what_is_no_name_says_what_it_is(given):
    with pytest.raises(TypeError, match=rf"A task's name is a string, got .*\({type(given).__name__}\)\. Name the tasks: "):
        plain_name(given)


def test_an_enum_that_is_no_string_is_told_what_to_do():
    with pytest.raises(TypeError, match=r"got <Bare.DEPTH: 'depth'> \(Bare\).*Take the member's \.name or \.value, or derive"):
        plain_name(Bare.DEPTH)


class Series:
    """As pandas gives pairs: it is no Mapping."""

    def __init__(self, values):
        self.values = values

    def items(self):
        return zip(self.values.keys(), self.values.values(), strict=True)

    def keys(self):
        return self.values.keys()

    def __len__(self):
        return len(self.values)

    def __bool__(self):
        raise ValueError("The truth value of a Series is ambiguous.")


@pytest.mark.parametrize("form", [dict, OrderedDict, Series])
def test_keys_become_plain(form):
    keys = plain_keys(form({np.str_("a"): 1, Task.DEPTH: 2}))
    assert keys == {"a": 1, "depth": 2} and {type(key) for key in keys} == {str}


def test_settings_as_loggers_take_them():
    settings = {"alpha": 0.5, "update": "paper", "lr": None, "residuals": ["pde"], "priorities": {"a": 2.0, "b": {"c": True}}}
    assert flat_settings(settings) == {
        "alpha": 0.5,
        "update": "paper",
        "lr": "None",
        "residuals": "['pde']",
        "priorities/a": 2.0,
        "priorities/b/c": True,
    }
