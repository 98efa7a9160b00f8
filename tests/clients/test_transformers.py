"""A BERT-like encoder with three heads: all of it trained, or by LoRA, with gradient checkpointing or without."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed; make clients installs it apart")
pytest.importorskip("peft", reason="peft is not installed; make clients installs it apart")

import lightning as L
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertModel

from lightning_gradnorm import GradNormCallback, MultiTaskMixin, total_loss
from lightning_gradnorm.gradient_reader import HiddenUseError
from tests.clients.oracle import Oracle, assert_moving, assert_same, fit

pytestmark = pytest.mark.client

WORDS, LENGTH, WIDTH = 40, 12, 32


def encoder(*, lora: bool = False, checkpoints: bool | None = None) -> nn.Module:
    """Of three layers; ``checkpoints`` says whether they are reentrant, ``None`` that there are none."""
    sizes = {"hidden_size": WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 48}
    bert = BertModel(BertConfig(vocab_size=WORDS, max_position_embeddings=LENGTH, **sizes), add_pooling_layer=False)
    if checkpoints is not None:
        bert.activation_checkpointing_enable({"use_reentrant": checkpoints})
    if not lora:
        return bert
    bert.enable_input_require_grads()
    return get_peft_model(bert, LoraConfig(r=4, target_modules=["query", "value"]))


def batches(count: int = 6, seed: int = 1) -> DataLoader:
    """A tag per word, how many words are of one kind, and whether one of another kind is there."""
    words = torch.randint(WORDS, (4 * count, LENGTH), generator=torch.Generator().manual_seed(seed))
    tags, number = words % 3, (words < 10).sum(1).float()
    seen = (words > 36).any(1).long()
    return DataLoader(TensorDataset(words, tags, 10 * number, seen), batch_size=4)


class Reader(L.LightningModule):
    """As people write it."""

    def __init__(self, oracle: Oracle | None = None, **settings):
        super().__init__()
        self.encoder = encoder(**settings)
        self.tag, self.number, self.seen = nn.Linear(WIDTH, 3), nn.Linear(WIDTH, 1), nn.Linear(WIDTH, 2)
        self.see = oracle.see if oracle else lambda losses: None

    def losses(self, batch) -> dict[str, Tensor]:
        words, tags, number, seen = batch
        states = self.encoder(input_ids=words).last_hidden_state
        losses = {
            "tag": F.cross_entropy(self.tag(states).flatten(0, 1), tags.flatten()),
            "number": F.mse_loss(self.number(states[:, 0])[:, 0], number),
            "seen": F.cross_entropy(self.seen(states[:, 0]), seen),
        }
        self.see(losses)
        return losses

    def training_step(self, batch, batch_idx):
        losses = self.losses(batch)
        return losses["tag"] + losses["number"] + losses["seen"]

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-3)


class WithTotalLoss(Reader):
    def training_step(self, batch, batch_idx):
        return total_loss(self.losses(batch))


class WithMixin(MultiTaskMixin, Reader):
    def training_step(self, batch, batch_idx):
        return self.total_loss(self.losses(batch))


def trained(kind: type[Reader], mode: str | None = "balance", **settings):
    """With a callback in that mode, or none."""
    callback = GradNormCallback(mode=mode, summary=False) if mode else None
    oracle = Oracle(callback) if mode else None
    torch.manual_seed(0)
    return callback, oracle, fit(kind(oracle, **settings), batches(), callback, oracle)


LAST_LAYER = "encoder.encoder.layer.2.output.dense.weight"
ADAPTERS = [
    f"encoder.base_model.model.encoder.layer.2.attention.self.{name}.lora_B.default.weight" for name in ("query", "value")
]


@pytest.mark.parametrize("lora", [False, True], ids=["all", "LoRA"])
def test_the_norms_are_those_of_autograd_and_the_weights_move(lora):
    callback, oracle, trace = trained(WithTotalLoss, lora=lora)
    assert trace.error(oracle) < 1e-6
    assert_moving(trace)
    assert callback.engine_used == "joint"


def test_the_layer_is_the_last_of_the_encoder():
    assert trained(WithTotalLoss)[0].shared.names == (LAST_LAYER,)


def test_of_an_encoder_with_lora_it_is_the_last_adapters_and_nothing_frozen():
    shared = trained(WithTotalLoss, lora=True)[0].shared
    assert list(shared.names) == ADAPTERS
    assert all(parameter.requires_grad for parameter in shared.parameters)


@pytest.mark.parametrize("lora", [False, True], ids=["all", "LoRA"])
def test_the_function_and_the_mixin_are_one_run(lora):
    assert_same(trained(WithTotalLoss, lora=lora)[2], trained(WithMixin, lora=lora)[2])


@pytest.mark.parametrize("lora", [False, True], ids=["all", "LoRA"])
def test_gradient_checkpoints_change_nothing(lora):
    _, oracle, trace = trained(WithTotalLoss, lora=lora, checkpoints=False)
    assert trace.error(oracle) < 1e-6
    assert_same(trace, trained(WithTotalLoss, lora=lora)[2])


@pytest.mark.parametrize("lora", [False, True], ids=["all", "LoRA"])
def test_reentrant_checkpoints_are_refused_with_the_way_out(lora):
    with pytest.raises((ValueError, HiddenUseError), match="use_reentrant=False"):
        trained(WithTotalLoss, lora=lora, checkpoints=True)


def test_watching_leaves_the_plain_run_as_it_is():
    watched, plain = trained(WithTotalLoss, "monitor")[2], trained(Reader, None)[2]
    assert torch.equal(watched.parameters, plain.parameters)
