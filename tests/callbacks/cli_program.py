"""What ``test_cli.py`` runs, in a process per namespace: a training program that takes its settings from a command line.

python -m tests.callbacks.cli_program lightning.pytorch two_tasks results.json '[["fit", "--trainer.max_epochs=1", …], …]'
"""

import importlib
import json
import sys
import warnings

import torch


def two_tasks(pl):
    """A module of two tasks, with its data, for one of Lightning's namespaces."""
    from lightning_gradnorm import MultiTaskMixin  # after the namespace, as programs do

    class Net(MultiTaskMixin, pl.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.trunk, self.a, self.b = torch.nn.Linear(3, 4), torch.nn.Linear(4, 1), torch.nn.Linear(4, 1)

        def training_step(self, batch, batch_idx):
            z = self.trunk(batch).tanh()
            return self.total_loss({"a": self.a(z).pow(2).mean(), "b": 9 * (self.b(z) - 1).pow(2).mean()})

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return torch.utils.data.DataLoader(torch.randn(12, 3, generator=torch.Generator().manual_seed(1)), batch_size=4)

    return Net


def foreign(pl):
    """A module that somebody else wrote around a network, with its criterion in the place of theirs."""
    from lightning_gradnorm import total_loss

    class Criterion(torch.nn.Module):
        def forward(self, z):
            return total_loss({"a": z[:, 0].pow(2).mean(), "b": 9 * (z[:, 1] - 1).pow(2).mean()})

    class Foreign(pl.LightningModule):
        def __init__(self, width: int = 4):
            super().__init__()
            torch.manual_seed(0)
            self.model = torch.nn.Module()
            self.model.trunk = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, width))
            self.model.heads = torch.nn.Linear(width, 2)
            self.criterion = Criterion()

        def training_step(self, batch, batch_idx):
            return self.criterion(self.model.heads(self.model.trunk(batch).tanh()))

        configure_optimizers, train_dataloader = two_tasks(pl).configure_optimizers, two_tasks(pl).train_dataloader

    return Foreign


def main(namespace, module, path, command_lines):
    warnings.simplefilter("ignore")
    pl = importlib.import_module(namespace)
    cli = importlib.import_module(f"{namespace}.cli")
    found = []
    for arguments in json.loads(command_lines):
        trainer = cli.LightningCLI(globals()[module](pl), args=arguments).trainer
        (balancing,) = [callback for callback in trainer.callbacks if hasattr(callback, "balancer")]
        settings = {name: str(value) for name, value in balancing.balancer.settings().items()}
        found.append(
            {
                "weights": balancing.weights,
                "steps": balancing.balancer.steps,
                "settings": settings,
                "layer": balancing.shared.names,
            }
        )
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
