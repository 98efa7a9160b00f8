"""Every test starts from the same seed, on one thread, and leaves torch's global settings as they were."""

import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import pytest
import torch
from hypothesis import settings

EXAMPLES = Path(__file__).parents[1] / "examples"

settings.register_profile("tests", deadline=None, max_examples=60, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(autouse=True)
def _same_start():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    yield
    torch.set_default_dtype(default)


@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """The example that the test names, imported as ``python examples/<name>.py`` finds it."""
    monkeypatch.syspath_prepend(EXAMPLES)
    yield importlib.import_module(request.param)
    for path in EXAMPLES.glob("*.py"):
        sys.modules.pop(path.stem, None)
