"""What is loaded when: the package's parts when they are asked for, and nothing heavy for the command's help and its report."""

import ast
import importlib
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils.tensorboard import SummaryWriter

import lightning_gradnorm

HEAVY = ("torch", "lightning", "numpy", "matplotlib", "rich", "tensorboard", "fsspec", "yaml")


def loaded_by(*lines, after=""):
    """The modules that a fresh interpreter has after these lines, without those that it has after the first."""
    program = "\n".join([after, "import sys", "before = set(sys.modules)", *lines, "print(*sorted(set(sys.modules) - before))"])
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()[-1].split()


def heavy(modules):
    return {name.partition(".")[0] for name in modules} & set(HEAVY)


def test_the_package_loads_nothing_heavy_until_it_is_asked():
    modules = loaded_by("import lightning_gradnorm", "lightning_gradnorm.__version__, dir(lightning_gradnorm)")
    assert "lightning_gradnorm" in modules
    assert heavy(modules) == set()


def test_help_loads_nothing_heavy():
    modules = loaded_by("from lightning_gradnorm.cli import main", "main(['--help'])")
    assert "lightning_gradnorm.cli" in modules
    assert heavy(modules) == set()


def test_a_report_of_event_files_needs_neither_torch_nor_lightning(tmp_path):
    with SummaryWriter(str(tmp_path)) as writer:
        for step in range(3):
            writer.add_scalar("loss_weight/a", 1.0, step)
    modules = loaded_by("from lightning_gradnorm.cli import main", f"main(['report', {str(tmp_path)!r}])")
    assert {"tensorboard", "matplotlib", "rich"} <= heavy(modules)
    assert heavy(modules).isdisjoint({"torch", "lightning"})
    assert (tmp_path / "loss_balancing.png").exists()


@pytest.mark.slow
def test_beside_lightning_all_of_it_loads_nothing_but_itself_and_torchs_own():
    modules = loaded_by("from lightning_gradnorm import *", after="import lightning")
    assert {"lightning_gradnorm.callbacks.gradnorm", "lightning_gradnorm.comparison"} <= set(modules)
    assert {name.partition(".")[0] for name in modules} - set(sys.stdlib_module_names) <= {"lightning_gradnorm", "torch"}


@pytest.mark.slow
@pytest.mark.parametrize("first", [True, False], ids=["before LightningCLI", "after it"])
def test_lightning_cli_knows_our_callbacks_by_their_short_names(first):
    lines = ["import lightning_gradnorm", "from lightning.pytorch.cli import LightningCLI"]
    modules = loaded_by(*(lines if first else reversed(lines)))
    assert {"lightning.pytorch.cli", "lightning_gradnorm.callbacks.gradnorm"} <= set(modules)


# -- the package's names -----------------------------------------------------------------------------------------------------


def test_what_type_checkers_read_is_what_is_there():
    tree = ast.parse(Path(lightning_gradnorm.__file__).read_text(encoding="utf-8"))
    (checked,) = (node for node in tree.body if isinstance(node, ast.If))
    read = {alias.name: line.module for line in checked.body for alias in line.names}
    assert sorted(read) == sorted(lightning_gradnorm.__all__)
    for name, room in read.items():
        assert getattr(lightning_gradnorm, name) is getattr(importlib.import_module(room), name)
        assert lightning_gradnorm._ROOM_OF[name] == room.partition(".")[2]


def test_a_star_brings_every_name_and_dir_shows_them():
    brought = {}
    exec("from lightning_gradnorm import *", brought)
    assert set(lightning_gradnorm.__all__) <= set(brought)
    assert {*lightning_gradnorm.__all__, "__version__", "balancers"} <= set(dir(lightning_gradnorm))


def test_a_name_that_is_not_there_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'lightning_gradnorm' has no attribute 'GradNorn'"):
        _ = lightning_gradnorm.GradNorn
    with pytest.raises(ImportError, match="cannot import name 'GradNorn'"):
        exec("from lightning_gradnorm import GradNorn")


def test_rooms_are_attributes_and_classes_are_pickled_by_where_they_are():
    assert lightning_gradnorm.balancers.GradNorm is lightning_gradnorm.GradNorm
    assert lightning_gradnorm.report.__name__ == "lightning_gradnorm.report", "also one that no name of the package is from"
    assert pickle.loads(pickle.dumps(lightning_gradnorm.GradNorm)) is lightning_gradnorm.GradNorm
