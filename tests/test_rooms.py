"""Imports run one way, as the plan of the house says; read from the source, since importing one room runs them all."""

import ast
import sys
from pathlib import Path

import pytest

import lightning_gradnorm

PACKAGE = "lightning_gradnorm"
ROOT = Path(lightning_gradnorm.__file__).parent

# Room → the rooms of ours that it may import; a room's own files may import each other.
FLOOR = {"losses", "measurement", "plain", "task_names"}  # torch and words
MAY_IMPORT = {
    "plain": set(),
    "deprecation": set(),
    "task_names": {"plain"},
    "losses": {"plain", "task_names"},
    "measurement": set(),
    "autograd_graph": set(),
    "shared_layer": {"autograd_graph", "descent"},
    "partial_products": set(),
    "vector_jacobian": {"partial_products"},
    "gram": {"measurement"},
    "factors": {"gram", "measurement"},
    "weight_products": {"factors", "gram", "vector_jacobian"},
    "descent": {"autograd_graph", "factors", "vector_jacobian"},
    "task_gradients": {"measurement", "factors"},
    "gradient_reader": {"autograd_graph", "measurement", "task_gradients"},
    "joint_backward": {
        "autograd_graph",
        "descent",
        "factors",
        "gradient_reader",
        "measurement",
        "task_gradients",
        "vector_jacobian",
        "weight_products",
    },
    "gradients": FLOOR
    | {"autograd_graph", "descent", "gradient_reader", "joint_backward", "task_gradients", "vector_jacobian"},
    "meeting_place": {"autograd_graph"},
    "recombination": {
        "autograd_graph",
        "meeting_place",
        "descent",
        "gradient_reader",
        "joint_backward",
        "task_gradients",
        "vector_jacobian",
    },
    "traces": {"autograd_graph", "descent", "gradient_reader", "task_gradients", "vector_jacobian"},
    "audit": {"autograd_graph", "measurement", "vector_jacobian"},
    "regularisers": set(),
    "reading": {
        "audit",
        "autograd_graph",
        "balancers",
        "descent",
        "gradients",
        "recombination",
        "task_gradients",
        "vector_jacobian",
    },
    "layer_watch": {"gradients"},
    "window": {"measurement", "task_gradients"},
    "folders": set(),
    "weights_file": {"folders"},
    "balancers": FLOOR | {"deprecation", "weights_file"},
    "pointwise": FLOOR | {"balancers"},
    "report": FLOOR | {"folders", "weights_file"},
    "door": FLOOR,
    "mixin": FLOOR | {"shared_layer"},
    "term_weight": {"plain"},
    "session": FLOOR
    | {
        "autograd_graph",
        "reading",
        "regularisers",
        "shared_layer",
        "gradients",
        "task_gradients",
        "term_weight",
        "traces",
        "window",
        "balancers",
        "pointwise",
        "door",
    },
    "callbacks": FLOOR
    | {
        "session",
        "shared_layer",
        "door",
        "term_weight",
        "window",
        "balancers",
        "report",
        "mixin",
        "pointwise",
        "folders",
        "weights_file",
    },
    "comparison": {"balancers", "callbacks", "report"},
    "diagnosis": FLOOR | {"session", "callbacks", "regularisers", "report"},
    "short_names": {"callbacks"},
    "cli": {"callbacks", "comparison", "diagnosis", "report"},
    "__init__": FLOOR
    | {
        "short_names",
        "gradients",
        "layer_watch",
        "shared_layer",
        "balancers",
        "door",
        "mixin",
        "pointwise",
        "session",
        "callbacks",
        "comparison",
        "diagnosis",
    },
}
KNOW_LIGHTNING = {"callbacks", "cli"}
# What else a room may stand on, beside torch and the standard library.
THIRD_PARTY = {
    "balancers": {"numpy"},
    "report": {"rich", "matplotlib", "tensorboard", "yaml"},
    "weights_file": {"yaml"},
    "term_weight": {"yaml"},
    "folders": {"fsspec"},
    "comparison": {"torchjd"},
}

FILES = sorted(ROOT.rglob("*.py"))


def room_of(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Every module that the file imports, anywhere in it, as absolute dotted names."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute here"
            whole = node.module or ""
            # `from lightning_gradnorm import mixin` imports a room by another spelling
            names |= {f"{whole}.{alias.name}" for alias in node.names} if whole == PACKAGE else {whole}
    return names


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith(f"{PACKAGE}.")}


def top_level(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_there_is_something_to_look_at():
    assert len(FILES) > 15
    assert {"callbacks", "balancers", "report", "gradients", "mixin", "__init__"} <= set(map(room_of, FILES))


def test_the_reader_sees_imports_in_every_spelling(tmp_path):
    file = tmp_path / "some.py"
    file.write_text(
        "import lightning as L\n"
        "from lightning_gradnorm import mixin\n"
        "def late():\n    import lightning_gradnorm.balancers.base\n    from lightning_gradnorm.report.tags import per_task\n"
    )
    assert rooms_imported(file) == {"mixin", "balancers", "report"}
    assert top_level(file) == {"lightning", PACKAGE}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_a_room_imports_only_the_rooms_below_it(path):
    room = room_of(path)
    assert room in MAY_IMPORT, f"a new room: say in DESIGN.md and here what {room!r} may import"
    assert rooms_imported(path) <= MAY_IMPORT[room] | {room}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_only_callbacks_and_the_command_line_know_lightning(path):
    known = top_level(path) & {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"}
    assert not known or room_of(path) in KNOW_LIGHTNING


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nor_does_another_room_import_by_a_name_put_together(path):
    calls = {"import_module", "__import__", "exec", "eval"}
    names = {getattr(node, "id", getattr(node, "attr", "")) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))}
    assert not names & calls or room_of(path) in KNOW_LIGHTNING | {"__init__"}


@pytest.mark.parametrize("path", FILES, ids=ids)
def test_nothing_else_is_needed(path):
    others = top_level(path) - set(sys.stdlib_module_names) - {PACKAGE, "torch"}
    allowed = THIRD_PARTY.get(room_of(path), set())
    assert others <= allowed | (
        {"lightning", "lightning_utilities", "torchmetrics"} if room_of(path) in KNOW_LIGHTNING else set()
    )


def test_the_table_has_no_way_back():
    """Following what may be imported never leads back to where one started."""

    def below(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"a circle: {' → '.join((*path, room))}"
        for other in MAY_IMPORT[room]:
            below(other, (*path, room))

    for room in MAY_IMPORT:
        below(room, ())
