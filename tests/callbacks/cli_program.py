"""What ``test_cli.py`` runs, in a process per namespace: a training program that takes its settings from a command line.

python -m tests.callbacks.cli_program lightning.pytorch results.json '[["fit", "--trainer.max_epochs=1", …], …]'
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


def main(namespace, path, command_lines):
    warnings.simplefilter("ignore")
    pl = importlib.import_module(namespace)
    cli = importlib.import_module(f"{namespace}.cli")
    found = []
    for arguments in json.loads(command_lines):
        trainer = cli.LightningCLI(two_tasks(pl), args=arguments).trainer
        (balancing,) = [callback for callback in trainer.callbacks if hasattr(callback, "balancer")]
        settings = {name: str(value) for name, value in balancing.balancer.settings().items()}
        found.append({"weights": balancing.weights, "steps": balancing.balancer.steps, "settings": settings})
    with open(path, "w", encoding="utf-8") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
