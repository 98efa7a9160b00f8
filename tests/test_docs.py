"""Pages that are written from the tests say what the tests say."""

import importlib.util
import re
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_gradnorm.balancers
import lightning_gradnorm.pointwise
from lightning_gradnorm import GradNormCallback
from tests.helpers import quiet_trainer

DOCS = Path(__file__).parent.parent / "docs"


def script(name):
    """A script of docs/, imported."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_features_is_up_to_date():
    make_features = script("make_features")
    assert len(make_features.rows()) > 30
    assert make_features.PAGE.read_text(encoding="utf-8") == make_features.page(), "run python docs/make_features.py"


def test_the_pictures_are_of_the_first_pages_program():
    names: dict[str, object] = {}
    exec(compile(script("make_pictures").program(), "program.jinja", "exec"), names)
    assert {"House", "GradNormCallback", "x", "sold", "data"} <= names.keys()
    assert "trainer" not in names


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*", "ignore:.*GPU available but not used.*")
def test_the_page_of_methods_names_them_all_and_its_code_runs(tmp_path, monkeypatch):
    text = (DOCS / "methods.md").read_text(encoding="utf-8")
    methods = set(lightning_gradnorm.balancers.__all__) - {"LossBalancer", "RuleBalancer"}
    points = {"UniformPoints", "SelfAdaptivePoints", "ResidualAttentionPoints", "GradientNormPoints"}
    assert {name for name in methods if f"| `{name}` |" not in text} == set()
    assert {name for name in points if f"- `{name}`" not in text} == set()
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks("methods.md"):
        exec(compile(block, "methods.md", "exec"), names)
    assert names["callback"].points.keys() == {"residual"}
    assert names["again"].balancer.weights_for(["price", "sold"]).tolist() == [0.001, 1.999]


def test_the_code_on_the_page_of_any_module_runs():
    names: dict[str, object] = {"torch": torch}
    first, second, third = blocks("any-module.md")
    for block in (first, second, third):
        exec(compile(block, "any-module.md", "exec"), names)
    assert (names["potential"].energy_weight, names["potential"].force_weight) == (0.01, 0.99)
    target = {"energy": torch.ones(3), "forces": torch.ones(3, 3)}
    assert names["Criterion"]()({name: 2 * value for name, value in target.items()}, target) == 2


def test_the_potential_on_the_page_of_forces_trains_and_its_layer_is_found(tmp_path, caplog):
    names: dict[str, object] = {}
    (block,) = blocks("forces.md")
    exec(compile(block, "forces.md", "exec"), names)

    class Potential(names["Potential"]):
        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=1e-3)

    batch = {"positions": torch.randn(4, 6), "energy": torch.zeros(4), "forces": torch.zeros(4, 6)}
    energy = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(0))
    callback = GradNormCallback(summary=False)
    caplog.set_level("INFO")
    quiet_trainer(tmp_path, callbacks=[callback]).fit(
        Potential(energy), torch.utils.data.DataLoader([batch] * 3, batch_size=None)
    )
    assert "energy.2.weight (8, 8): 64 entries, the last hidden weight" in caplog.text
    assert callback.balancer.steps == 3


LIBRARIES = "accelerate", "transformers"  # whose blocks are run where they are installed, by tests/clients


def test_the_code_on_the_page_of_loops_runs():
    names: dict[str, object] = {}
    ours = [block for block in blocks("loops.md") if not any(f"from {library} import" in block for library in LIBRARIES)]
    sessions = []
    for block in ours:
        exec(compile(block, "loops.md", "exec"), names)
        sessions.append(names["session"])
    by_hand, by_fabric = (session.balancer for session in sessions)
    assert by_hand.steps == by_fabric.steps == 16
    assert by_hand.weights["sold"] > 1 > by_hand.weights["price"]
    assert by_fabric.weights["sold"] > 1 > by_fabric.weights["price"]


def test_the_page_of_loops_shows_the_examples_two_classes():
    example = (DOCS.parent / "examples" / "transformers_trainer.py").read_text(encoding="utf-8")
    (block,) = [block for block in blocks("loops.md") if "from transformers import" in block]
    assert block[block.index("class BalancedTrainer") :].strip() in example
    assert "class Balancing(TrainerCallback)" in block
