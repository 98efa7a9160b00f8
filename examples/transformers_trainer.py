"""GradNorm under ``transformers.Trainer``: a small BERT with three heads, on sequences made in code.

``BalancedTrainer`` and ``Balancing`` are all that it takes, for any model: copy them. Where the model, or ``compute_loss``,
adds its losses up, ``total_loss`` does. Accumulated batches, precision, gradient checkpointing, several processes
(``torchrun``), evaluation and checkpoints work as before; a resumed run goes on with the weights that it had.

    pip install transformers accelerate
    python examples/transformers_trainer.py            # a minute or so
    python examples/transformers_trainer.py --help
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _common import loop_parser, print_held_out
from accelerate import PartialState
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel, Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from lightning_gradnorm import BalancingSession, EqualWeights, GradNorm, Loop, LossBalancer, RankAgreement, total_loss


class BalancedTrainer(Trainer):
    """Weighs the losses that ``total_loss`` is given, in the model's ``forward`` or in ``compute_loss``.

    Args:
        args: those of a Trainer.
        balancer: the method.
        shared_layer: dotted name of the layer that the tasks share; found by itself if it is not given.
        kwargs: those of a Trainer.
    """

    def __init__(self, *args: Any, balancer: LossBalancer, shared_layer: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # losses are means, to be divided where batches are accumulated
        self.session = BalancingSession(balancer)
        self.add_callback(Balancing(self.session, shared_layer))

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        with self.session.batch():
            loss = super().training_step(*args, **kwargs)
            self.session.after_backward()
        return loss

    def compute_loss(self, model: nn.Module, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        self.session.before_backward(loss)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        weights = {f"loss_weight/{task}": weight for task, weight in self.session.balancer.weights.items()}
        super().log(logs | weights if "loss" in logs else logs, *args, **kwargs)


class Balancing(TrainerCallback):
    """A run's beginning and end, its steps, and its state in every checkpoint."""

    def __init__(self, session: BalancingSession, shared_layer: str | None) -> None:
        self.session, self.shared_layer = session, shared_layer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step:  # resumed from a checkpoint
            self.session.load_state_dict(torch.load(self.file(args, state), weights_only=True))
        model = kwargs["model"]
        self.session.open(Loop(model, lambda: self.shared_layer, name="BalancedTrainer", ranks=RankAgreement.of(model)))

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.step()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.end_epoch()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.session.state_dict(), self.file(args, state))

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.session.close()

    @staticmethod
    def file(args: Any, state: Any) -> Path:
        return Path(args.output_dir, f"checkpoint-{state.global_step}", "balancing.pt")


# -- a model and data --------------------------------------------------------------------------------------------------------

WORDS, LENGTH = 32, 16


class Sequences(Dataset[dict[str, Tensor]]):
    """Random words; the share that is small, their mean value, and whether the first comes again."""

    def __init__(self, size: int, seed: int) -> None:
        self.words = torch.randint(WORDS, (size, LENGTH), generator=torch.Generator().manual_seed(seed))

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, k: int) -> dict[str, Tensor]:
        words = self.words[k]
        return {
            "input_ids": words,
            "small": (words < 8).float().mean(),
            "value": words.float().mean(),
            "again": (words[1:] == words[0]).any().long(),
        }


class ThreeHeads(nn.Module):
    """A small BERT, and a head per task on the mean of its last states."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        self.encoder = BertModel(BertConfig(vocab_size=WORDS, **sizes, **dropout), add_pooling_layer=False)
        self.small, self.value, self.again = nn.Linear(64, 1), nn.Linear(64, 1), nn.Linear(64, 2)
        nn.init.constant_(self.value.bias, (WORDS - 1) / 2)

    def forward(self, input_ids: Tensor, small: Tensor, value: Tensor, again: Tensor) -> dict[str, Tensor]:
        states = self.encoder(input_ids).last_hidden_state.mean(1)
        losses = {
            "small": F.mse_loss(self.small(states).squeeze(1), small),
            "value": F.mse_loss(self.value(states).squeeze(1), value),
            "again": F.cross_entropy(self.again(states), again),
        }
        return {"loss": total_loss(losses)} | {task: loss.detach() for task, loss in losses.items()}


def train(balancer: LossBalancer, args: argparse.Namespace, folder: str) -> dict[str, float]:
    """One run; the losses on held-out sequences."""
    torch.manual_seed(args.seed)
    model, held_out = ThreeHeads(), Sequences(1000, seed=10_000)
    settings = TrainingArguments(
        output_dir=folder,
        max_steps=args.steps,
        per_device_train_batch_size=32,
        learning_rate=1e-3,
        seed=args.seed,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    BalancedTrainer(model, settings, train_dataset=Sequences(4000, seed=args.seed), balancer=balancer).train()
    model.eval()
    with torch.no_grad():
        found = model(**torch.utils.data.default_collate(list(held_out)))
    return {task: found[task].item() for task in ("small", "value", "again")}


def main(arguments: Sequence[str] | None = None) -> None:
    args = loop_parser(__doc__, "of 32 sequences each", steps=600).parse_args(arguments)
    logging.set_verbosity_error()
    gradnorm = GradNorm(alpha=args.alpha)
    with tempfile.TemporaryDirectory() as folder:
        equal, balanced = train(EqualWeights(), args, folder), train(gradnorm, args, folder)
    if not PartialState().is_main_process:
        return
    print_held_out(equal, balanced, gradnorm.weights)


if __name__ == "__main__":
    main()
