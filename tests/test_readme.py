"""The README's Python blocks run as they stand there, and GradNorm's docstring keeps its word."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*", "ignore:.*GPU available but not used.*")
@pytest.mark.parametrize("block", BLOCKS, ids=range(len(BLOCKS)))
def test_python_blocks_run(block, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    weights = names["gradnorm"].weights if "gradnorm" in names else names["trainer"].callbacks[0].weights
    assert len(weights) == 2
    small, large = (weights[task] for task in (("a", "b") if "a" in weights else ("sold", "price")))
    assert small > 1 > large, "the loss with the larger gradient has the smaller weight"


def test_there_are_blocks():
    assert len(BLOCKS) == 2


def test_the_diff_is_short_and_the_first_screen_too():
    diff = re.search(r"```diff\n(.*?)```", README, flags=re.DOTALL).group(1)
    assert sum(line.startswith(("+", "-")) for line in diff.splitlines()) <= 6
    assert len(README.split("pip install")[0].split()) <= 120


def test_links_to_files_lead_somewhere():
    targets = [target for target in re.findall(r"\]\(([^)#]+)\)", README) if not target.startswith("http")]
    assert targets
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_the_four_lines_of_gradnorms_docstring():
    from lightning_gradnorm import GradNorm, JointBackward, tap_losses

    block = re.search(r"a bare PyTorch loop.*?::\n\n(.*?)\n\n", GradNorm.__doc__, flags=re.DOTALL).group(1)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.shared, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)

        def forward(self, x):
            return self.head(self.shared(x).tanh())

    net = Net()
    names = {
        "GradNorm": GradNorm,
        "JointBackward": JointBackward,
        "tap_losses": tap_losses,
        "net": net,
        "optimizer": torch.optim.SGD(net.parameters(), lr=0.1),
        "batches": [(torch.randn(5, 3), torch.randn(5, 1)) for _ in range(10)],
        "loss_a": torch.nn.functional.mse_loss,
        "loss_b": lambda y, target: 100 * torch.nn.functional.l1_loss(y, target),
    }
    exec(compile(re.sub(r"^ {8}", "", block, flags=re.MULTILINE), "GradNorm", "exec"), names)
    assert names["gradnorm"].weights["a"] > 1 > names["gradnorm"].weights["b"]
    added = [line for line in block.splitlines() if re.search(r"gradnorm|tap_losses|JointBackward", line)]
    assert len(added) == 5  # the constructor, and four lines in the loop
