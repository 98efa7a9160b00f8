"""The README's program runs as it stands there, and GradNorm's docstring keeps its word."""

import re
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.filterwarnings("ignore:.*tensorboardX.*", "ignore:.*GPU available but not used.*")
def test_the_program_runs_and_prints_what_the_readme_says(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (block,) = BLOCKS
    names = {"__name__": "readme"}
    exec(compile(block, "README.md", "exec"), names)
    weights = names["trainer"].callbacks[0].weights
    assert weights["sold"] > 1 > weights["price"], "the loss with the larger gradient has the smaller weight"
    said = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL).group(1)
    printed = [line for line in capsys.readouterr().out.splitlines() if "sold or not" in line]
    right, off = (
        [[float(re.search(pattern, line).group(1)) for line in lines] for lines in (printed, said.splitlines())]
        for pattern in (r"(\d+)% right", r"([\d.]+) off")
    )
    assert right[0] == pytest.approx(right[1], abs=6)
    assert off[0] == pytest.approx(off[1], abs=0.3)
    assert right[0][1] > right[0][0] + 15


def test_the_diff_is_short_and_the_first_screen_too():
    diff = re.search(r"```diff\n(.*?)```", README, flags=re.DOTALL).group(1)
    assert sum(line.startswith(("+", "-")) for line in diff.splitlines()) <= 6
    assert len(README.split("pip install")[0].split()) <= 120


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
