"""transformers.Trainer with the two classes of the example: it comes to what the callback comes to on the same batches."""

import os
import warnings

import pytest

pytest.importorskip("transformers", reason="transformers is not installed; make clients installs it apart")
pytest.importorskip(
    "accelerate", reason="accelerate, which its Trainer needs, is not installed; make clients installs it apart"
)

import torch
import transformers
from accelerate.state import AcceleratorState, GradientState
from torch import nn
from transformers import BertConfig, BertModel, BertPreTrainedModel, TrainerCallback, TrainingArguments

from lightning_gradnorm import total_loss
from tests.callbacks.two_processes import WORLD, on_two_processes
from tests.conftest import EXAMPLES
from tests.helpers import same_state
from tests.loops import Network, Run, assert_close, balancer, by_the_callback, moved, of_rank, optimizer_of, rows, same

pytestmark = [
    pytest.mark.client,
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.parametrize("example", ["transformers_trainer"], indirect=True),
]


@pytest.fixture(autouse=True)
def _another_accelerator():
    """Trainers of one process share their settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


class Watch(TrainerCallback):
    """The weights after every step, and what was logged."""

    def __init__(self, session):
        self.session, self.run, self.logged = session, Run(), []

    def on_step_end(self, args, state, control, **kwargs):
        self.run.weights.append(self.session.balancer.weights)

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logged.append(logs)


def made(example, folder, x, *, network=None, size=8, accumulate=1, trainer=None, labelled=False, **settings):
    """A Trainer over the rows in their order, and what watches it.

    Args:
        example: where the classes are.
        folder: for checkpoints.
        x: the rows.
        network: what is trained.
        size: of a batch.
        accumulate: how many batches a step has.
        trainer: another class.
        labelled: whether a row has ``labels``, by that name.
        settings: of TrainingArguments.
    """
    network = network or Network()
    defaults = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    args = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=1,
        per_device_train_batch_size=size,
        gradient_accumulation_steps=accumulate,
        train_sampling_strategy="sequential",
        max_grad_norm=0,
        dataloader_pin_memory=False,
        **(defaults | settings),
    )
    optimizer = optimizer_of(network)
    found = (trainer or example.BalancedTrainer)(
        network,
        args,
        train_dataset=[{"x": row} | ({"labels": 0} if labelled else {}) for row in x],
        eval_dataset=[{"x": row} for row in rows(2)],
        optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)),
        balancer=balancer(),
    )
    watch = Watch(found.session)
    found.add_callback(watch)
    return found, watch


def train(example, folder, x, *, resume=None, **settings):
    trainer, watch = made(example, folder, x, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return watch.run.ended(trainer.model, trainer.session)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("absent", [[], [1, 2]], ids=["every task in every batch", "a task absent from some"])
def test_it_equals_the_callback_bit_for_bit(example, tmp_path, accumulate, absent):
    x = rows(absent=absent)
    found = train(example, tmp_path, x, accumulate=accumulate)
    assert len(found.weights) == 6 // accumulate
    assert same(found, by_the_callback(tmp_path, x.split(8), accumulate_grad_batches=accumulate))
    assert moved(found)


class AnyArguments(Network):
    """Of such a model the Trainer takes it that its loss is a sum over the labels, divided by all of an accumulated batch."""

    def forward(self, x, labels, **kwargs):
        return super().forward(x)


@pytest.mark.parametrize("network", [Network, AnyArguments])
def test_accumulated_batches_are_one_large_batch(example, tmp_path, float64, network):
    x, labelled = rows().double(), network is AnyArguments
    found = train(example, tmp_path, x, size=4, accumulate=4, network=network(), labelled=labelled)
    assert_close(vars(found), train(example, tmp_path, x, size=16, network=network(), labelled=labelled), rel=1e-9)


def test_in_half_precision_too(example, tmp_path):
    found = train(example, tmp_path, rows(), bf16=True)
    assert same(found, by_the_callback(tmp_path, rows().split(8), precision="bf16-mixed"))
    assert moved(found)


def test_losses_of_a_compute_loss_of_ones_own_are_the_same(example, tmp_path):
    class Silent(Network):
        def forward(self, x):
            return self.losses(x)

    class Own(example.BalancedTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
            losses = model(**inputs)
            loss = total_loss(losses)
            self.session.before_backward(loss)
            return (loss, losses) if return_outputs else loss

    found = train(example, tmp_path, rows(), network=Silent(), trainer=Own)
    assert same(found, train(example, tmp_path, rows()))
    assert moved(found)


def test_a_checkpoint_has_the_session_and_resumes_exactly(example, tmp_path):
    whole = train(example, tmp_path / "whole", rows())
    train(example, tmp_path / "half", rows(), save_strategy="steps", save_steps=3)
    again = train(example, tmp_path / "half", rows(), resume=str(tmp_path / "half" / "checkpoint-3"))
    assert again.weights == whole.weights[3:]
    assert same_state(again.state, whole.state)
    assert all(torch.equal(again.parameters[name], value) for name, value in whole.parameters.items())


def test_evaluation_is_the_plain_sum_and_the_log_has_the_weights(example, tmp_path):
    trainer, watch = made(example, tmp_path, rows(), eval_strategy="steps", eval_steps=3, label_names=["x"])
    trainer.train()
    evaluated = [logs["eval_loss"] for logs in watch.logged if "eval_loss" in logs]
    plain = sum(trainer.model.losses(rows(2)).values()).item()
    assert len(evaluated) == 2
    assert evaluated[-1] == pytest.approx(plain, rel=1e-6)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(plain, rel=1e-6)
    logged = [logs for logs in watch.logged if "loss" in logs]
    assert [logs["loss_weight/small"] for logs in logged] == [weights["small"] for weights in watch.run.weights]


class Encoder(BertPreTrainedModel):
    """A small BERT with two heads."""

    def __init__(self):
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
        super().__init__(BertConfig(vocab_size=20, **sizes))
        self.bert = BertModel(self.config, add_pooling_layer=False)
        self.heads = nn.ModuleList([nn.Linear(16, 1), nn.Linear(16, 1)])
        self.post_init()

    def forward(self, x):
        words = (20 * x).long().clamp(max=19)
        a, b = (head(self.bert(words).last_hidden_state.mean(1)).squeeze(1) for head in self.heads)
        losses = {"mean": (a - x.mean(1)).square().mean(), "words": 5 * (b - 0.1 * words.sum(1)).square().mean()}
        return {"loss": total_loss(losses)}


def test_a_bert_whose_activations_are_checkpointed_equals_the_callback_too(example, tmp_path):
    found = train(example, tmp_path, rows(), network=Encoder(), activation_checkpointing=True, seed=7)
    plain = train(example, tmp_path, rows(), network=Encoder(), seed=7)
    network = Encoder()
    transformers.set_seed(7)  # of the dropout
    expected = by_the_callback(tmp_path, rows().split(8), network)
    assert network.bert.encoder.layer[0].training
    assert same(plain, expected)
    assert same(found, expected)
    assert moved(found)


def test_the_example_trains_both_ways(example, capsys):
    example.main(["--steps", "3"])
    printed = capsys.readouterr().out
    for word in ("small", "value", "again", "equal weights", "GradNorm's weight"):
        assert word in printed


# -- several processes -------------------------------------------------------------------------------------------------------


def on_a_rank(rank, path):
    import sys

    os.environ.update(RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD))
    sys.path.insert(0, str(EXAMPLES))
    import transformers_trainer

    warnings.simplefilter("ignore")
    found = {}
    for name, x, accumulate in two_process_cases():
        # the Trainer deals whole batches out to the ranks in turn
        settings = {"size": 4, "accumulate": accumulate, "ddp_find_unused_parameters": True}
        found[name] = of_rank(train(transformers_trainer, path.parent / "runs", x, **settings))
    torch.save(found, path)


def two_process_cases():
    return [("plain", rows(), 1), ("accumulated", rows(), 2), ("absent", rows(absent=[1]), 2)]


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_batches(example, tmp_path):
    one, other = on_two_processes(on_a_rank, tmp_path)
    for name, x, accumulate in two_process_cases():
        assert one[name]["weights"] == other[name]["weights"]
        assert_close(one[name], train(example, tmp_path, x, accumulate=accumulate))
