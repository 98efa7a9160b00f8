"""Up to a thousand tasks: what a step costs, and what a run leaves behind to log, to read and to draw."""

import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_gradnorm import BalancingSession, GradNorm, GradNormCallback, MultiTaskMixin
from lightning_gradnorm.report.history import read_history
from lightning_gradnorm.report.run import draw

Row = dict[str, Any]


def seconds(step: Callable[[], object], repeats: int) -> float:
    """Median CPU time of a step, after one that does not count."""
    step()
    times = []
    for _ in range(repeats):
        start = time.process_time()
        step()
        times.append(time.process_time() - start)
    return statistics.median(times)


class Heads(nn.Module):
    """So many regressions on one trunk."""

    def __init__(self, tasks: int) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
        self.heads = nn.Linear(64, tasks)

    def losses(self, x: Tensor) -> dict[str, Tensor]:
        """Task → scalar."""
        errors = (self.heads(self.trunk(x)) - x[:, :1]).square().mean(0)
        return {f"task {k}": errors[k] for k in range(len(errors))}


def loop_seconds(network: Heads, x: Tensor, every: int | None, repeats: int) -> float:
    """Of a step in a bare loop: plain, or with a session that measures one in ``every``."""
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    session = None if every is None else BalancingSession(GradNorm(update_every=every), network)

    def step() -> None:
        losses = network.losses(x)
        if session is None:
            sum(losses.values()).backward()
        else:
            with session.batch():
                total = session.total(losses)
                session.before_backward(total)
                total.backward()
                session.after_backward()
        optimizer.step()
        optimizer.zero_grad()
        if session is not None:
            session.step()

    step()  # W is found and the reading proved
    return seconds(step, repeats)


def logged(tasks: int) -> Row:
    """What a run of the Trainer leaves behind, and how long it takes to log, to read and to draw."""

    class Module(MultiTaskMixin, L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = Heads(tasks)

        def task_losses(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
            return self.net.losses(batch[0])

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=1e-3)

    class Times(L.Callback):
        def __init__(self) -> None:
            self.of: list[float] = []

        def on_train_batch_start(self, *args: Any) -> None:
            self.of.append(time.process_time())

    callback, times = GradNormCallback(update_every=1 << 40, summary=False), Times()
    logger = TensorBoardLogger(tempfile.mkdtemp())
    trainer = L.Trainer(
        max_epochs=1, logger=logger, log_every_n_steps=4, callbacks=[times, callback], accelerator="cpu",
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(Module(), DataLoader(TensorDataset(torch.randn(16 * 41, 16)), batch_size=16))
    took = [after - before for before, after in itertools.pairwise(times.of)]  # of the steps 1 to 40
    written, others = took[7::4], [seconds for number, seconds in enumerate(took[4:], 5) if number % 4]
    size = sum(file.stat().st_size for file in Path(logger.log_dir).glob("events*"))
    start = time.process_time()
    history = read_history(logger.log_dir)
    read = time.process_time() - start
    start = time.process_time()
    draw(history, logger.log_dir)
    return {
        "tags": len(callback.logged),
        "written_seconds": statistics.median(written) - statistics.median(others),
        "written_bytes": size / 10,
        "read_seconds": read / 10,
        "figure_seconds": time.process_time() - start,
    }


def tasks() -> list[Row]:
    """Up to a thousand."""
    rows = []
    for count in (3, 10, 100, 1000):
        torch.manual_seed(0)
        network, x, repeats = Heads(count), torch.randn(16, 16), max(5, 3000 // count)
        ways = {"plain_seconds": None, "unmeasured_seconds": 1 << 40, "measured_seconds": 1}
        times = {name: loop_seconds(network, x, every, min(repeats, 200)) for name, every in ways.items()}
        rows.append({"tasks": count, **times, **logged(count)})
        print(rows[-1], flush=True)
    return rows
