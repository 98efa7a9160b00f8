"""What the loggers get: the values of the step itself, under the documented tags."""

import math
import re

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2

from lightning_gradnorm import GradNormCallback, LossBalancingCallback, UncertaintyWeighting
from lightning_gradnorm.report.tags import CHARTS
from tests.helpers import SCALES, MemoryLogger, TrunkAndHeads, batches, quiet_trainer

TASKS = list(SCALES)
PER_TASK = ["loss_weight", "task_loss", "grad_norm", "target_norm", "loss_ratio", "inverse_rate"]
PAIRS = [f"{a}_{b}" for i, a in enumerate(TASKS) for b in TASKS[i + 1 :]]
TAGS = {f"{tag}/{task}" for tag in PER_TASK for task in TASKS} | {f"grad_cosine/{pair}" for pair in PAIRS}
TAGS |= {"total_loss/weighted", "total_loss/unweighted"}


class Watcher(L.Callback):
    """Before and after each update: applied weights, losses, and the gradients by the slow way."""

    def __init__(self, balancing):
        self.balancing, self.steps = balancing, []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        applied = self.balancing.balancer.weights_for(TASKS).tolist()
        losses = pl_module.losses(batch[0])
        gradients = [
            torch.autograd.grad(loss, pl_module.trunk[2].weight, retain_graph=True)[0].flatten().double()
            for loss in losses.values()
        ]
        self.steps.append((applied, [loss.item() for loss in losses.values()], gradients))


def expected(steps):
    first = steps[0][1]
    for applied, losses, gradients in steps:
        ratios = [loss / l0 for loss, l0 in zip(losses, first, strict=True)]
        rates = [ratio / (sum(ratios) / len(ratios)) for ratio in ratios]
        norms = [w * g.norm().item() for w, g in zip(applied, gradients, strict=True)]
        shares = [ratio**1.5 for ratio in ratios]
        plain = sum(g.norm().item() for g in gradients)
        targets = [plain * share / sum(shares) for share in shares]
        rows = zip(PER_TASK, (applied, losses, norms, targets, ratios, rates), strict=True)
        values = {f"{tag}/{task}": value for tag, row in rows for task, value in zip(TASKS, row, strict=True)}
        for i, a in enumerate(TASKS):
            for j, b in enumerate(TASKS[i + 1 :], i + 1):
                values[f"grad_cosine/{a}_{b}"] = torch.cosine_similarity(gradients[i], gradients[j], dim=0).item()
        values["total_loss/weighted"] = sum(w * loss for w, loss in zip(applied, losses, strict=True))
        values["total_loss/unweighted"] = sum(losses)
        yield values


def test_every_logger_gets_the_values_of_the_step_itself(tmp_path):
    callback = GradNormCallback(alpha=1.5, summary=False)
    watcher = Watcher(callback)
    loggers = [TensorBoardLogger(tmp_path / "tb"), CSVLogger(tmp_path / "csv"), MemoryLogger()]
    quiet_trainer(tmp_path, callbacks=[watcher, callback], logger=loggers).fit(TrunkAndHeads(), batches(8))
    events = EventAccumulator(loggers[0].log_dir).Reload()
    assert set(events.Tags()["scalars"]) >= TAGS
    assert len(loggers[2].logged) == 8
    for step, values in enumerate(expected(watcher.steps)):
        at, logged = loggers[2].logged[step]
        assert at == step
        assert {tag: logged[tag] for tag in TAGS} == pytest.approx(values, rel=1e-5, abs=1e-6), step
        for tag in TAGS:
            event = events.Scalars(tag)[step]
            assert event.step == step
            assert event.value == pytest.approx(logged[tag], rel=1e-6)
    rows = (tmp_path / "csv" / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    assert set(rows[0].split(",")) >= TAGS
    assert len(rows) == 1 + 8 + 1, "names, steps, the epoch"


@pytest.mark.feature(
    "`log_every_n_steps` beside `update_every`", "supported", "a written step that is not measured shows the last measurement"
)
def test_a_written_step_shows_the_last_measurement(tmp_path):
    memory, callback = MemoryLogger(), GradNormCallback(update_every=8, summary=False)
    measured = {}

    class Watch(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if callback.balancer.diagnostics:
                measured[batch_idx] = {tag: vector.tolist() for tag, vector in callback.balancer.diagnostics.items()}

    torch.manual_seed(0)
    trainer = quiet_trainer(tmp_path, callbacks=[callback, Watch()], logger=memory, log_every_n_steps=3)
    trainer.fit(TrunkAndHeads(), batches(40))
    torch.manual_seed(0)
    every = quiet_trainer(
        tmp_path, callbacks=[GradNormCallback(update_every=8, summary=False)], logger=(whole := MemoryLogger())
    )
    every.fit(TrunkAndHeads(), batches(40))
    steps = [step for step, values in memory.logged if "grad_norm/small" in values]
    assert steps == list(range(2, 40, 3)), "no gaps"
    assert not set(measured) >= set(steps), "most of them were not measured"
    for step, values in memory.logged[: len(steps)]:
        last = max(at for at in measured if at <= step)
        for tag, vector in measured[last].items():
            assert [values[f"{tag}/{task}"] for task in TASKS] == pytest.approx(vector, rel=1e-6)
        for pair in PAIRS:
            assert values[f"grad_cosine/{pair}"] == pytest.approx(whole.logged[last][1][f"grad_cosine/{pair}"], rel=1e-6)


@pytest.mark.feature(
    "`log_every_n_steps` with accumulation", "supported", "what is written belongs to the step that is written"
)
def test_only_written_steps_are_logged(tmp_path, monkeypatch):
    memory, callback, calls = MemoryLogger(), GradNormCallback(lr=0.1, summary=False), []
    module = TrunkAndHeads()
    log_dict = module.log_dict

    def counting(values, on_step, **settings):
        calls.extend([values] if on_step else [])
        log_dict(values, on_step=on_step, **settings)

    monkeypatch.setattr(module, "log_dict", counting)
    watcher = Watcher(callback)
    trainer = quiet_trainer(
        tmp_path, callbacks=[watcher, callback], logger=memory, log_every_n_steps=4, accumulate_grad_batches=2
    )
    trainer.fit(module, batches(18))  # 9 optimiser steps
    assert [step for step, _ in memory.logged] == [3, 7]
    assert len(calls) == 2
    second_of_pair = watcher.steps[2 * 7 + 1][0]
    assert [memory.logged[1][1][f"loss_weight/{task}"] for task in TASKS] == pytest.approx(second_of_pair, rel=1e-6)


def charts_of(logger):
    """Title → regular expressions, of the page of charts."""
    (event,) = EventAccumulator(logger.log_dir).Reload().Tensors("custom_scalars__config__")
    layout = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    return {chart.title: list(chart.multiline.tag) for category in layout.category for chart in category.chart}


@pytest.mark.parametrize(
    ("callback", "missing"),
    [
        (lambda: GradNormCallback(update_every=3, log_cosines=True, summary=False), set()),
        (lambda: GradNormCallback(log_cosines=False, summary=False), {"gradient cosines"}),
        (
            lambda: LossBalancingCallback(UncertaintyWeighting(), summary=False, log_cosines=False),
            {"gradient cosines", "weighted gradient norms and their targets", "loss ratios and inverse rates"},
        ),
    ],
    ids=["all", "no cosines", "uncertainty"],
)
def test_there_is_a_chart_of_what_is_logged_and_of_nothing_else(tmp_path, callback, missing):
    logger = TensorBoardLogger(tmp_path)
    trainer = quiet_trainer(tmp_path, callbacks=[callback()], logger=logger, log_every_n_steps=2)
    trainer.fit(TrunkAndHeads(), batches(6))
    assert charts_of(logger).keys() == CHARTS.keys() - missing
    assert len(CHARTS) == 6


def test_tensorboard_has_one_chart_with_all_tasks(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)], logger=logger).fit(TrunkAndHeads(), batches(3))
    charts = charts_of(logger)
    shown = {
        title: {tag for tag in TAGS if any(re.match(regex, tag) for regex in regexes)} for title, regexes in charts.items()
    }
    assert shown["loss weights"] == {f"loss_weight/{task}" for task in TASKS}
    assert shown["weighted gradient norms and their targets"] == {
        f"{tag}/{t}" for tag in ("grad_norm", "target_norm") for t in TASKS
    }
    assert sum(map(len, shown.values())) == len(TAGS)
    assert [path.name for path in (tmp_path / "lightning_logs" / "version_0").iterdir() if path.is_dir()] in (
        [],
        ["checkpoints"],
    )


@pytest.mark.feature("`logger=False`, `barebones`, `log_every_n_steps=0`", "supported")
@pytest.mark.parametrize("settings", [{"logger": False}, {"fast_dev_run": 3}, {"barebones": True}, {"log_every_n_steps": 0}])
def test_it_works_where_nothing_is_logged(tmp_path, settings):
    callback = GradNormCallback(lr=0.1)
    barebones = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"))
    extra = barebones | {"num_sanity_val_steps": None, "log_every_n_steps": None} if "barebones" in settings else {}
    quiet_trainer(tmp_path, callbacks=[callback], **(extra | settings)).fit(TrunkAndHeads(), batches(3))
    assert callback.balancer.steps == 3
    assert callback.weights["small"] > 1
    assert not list(tmp_path.rglob("loss_weights.yaml"))


def test_weights_on_the_progress_bar_on_request(tmp_path):
    for wanted in (True, False):
        trainer = quiet_trainer(tmp_path, callbacks=[GradNormCallback(progress_bar=wanted, summary=False)])
        trainer.fit(TrunkAndHeads(), batches(3))
        assert set(trainer.progress_bar_metrics) == ({f"w/{task}" for task in TASKS} if wanted else set())


def test_the_progress_bar_keeps_its_length(tmp_path):
    """As Lightning's bar writes its numbers: five characters or six, whatever the weight's size."""
    assert len(TASKS) == 4, "as many as it has room for"
    bar = TQDMProgressBar()
    for scales in (SCALES, {f"t{k}": 10.0**-k for k in range(6)}):
        callback = GradNormCallback(progress_bar=True, summary=False)
        trainer = quiet_trainer(tmp_path, callbacks=[callback])
        trainer.fit(TrunkAndHeads(scales=scales), batches(12))
        shown = {name: value for name, value in bar.get_metrics(trainer, trainer.lightning_module).items() if name != "v_num"}
        exact = {task: weight.item() for task, weight in zip(callback.balancer.tasks, callback.logged.values(), strict=False)}
        assert len(shown) <= 4
        assert all(4 <= len(Tqdm.format_num(value)) <= 6 for value in shown.values())
        if scales is SCALES:
            assert shown == {f"w/{task}": pytest.approx(weight, rel=0.051) for task, weight in exact.items()}
        else:
            assert shown == {
                "w/min": pytest.approx(min(exact.values()), rel=0.051),
                "w/max": pytest.approx(max(exact.values()), rel=0.051),
            }


def test_cosines_are_left_out_for_many_tasks_unless_asked_for(tmp_path):
    many = {f"t{k}": 1.0 for k in range(5)}
    for wanted, count in ((None, 0), (True, 10)):
        memory = MemoryLogger()
        callback = GradNormCallback(log_cosines=wanted, summary=False)
        quiet_trainer(tmp_path, callbacks=[callback], logger=memory).fit(TrunkAndHeads(scales=many), batches(2))
        assert sum(tag.startswith("grad_cosine/") for tag in memory.logged[0][1]) == count


def test_end_of_fit_prints_the_table_and_writes_the_weights(tmp_path, capsys):
    logger, callback = CSVLogger(tmp_path), GradNormCallback(lr=0.1)
    watcher = Watcher(callback)
    quiet_trainer(tmp_path, callbacks=[watcher, callback], logger=logger, max_epochs=2).fit(TrunkAndHeads(), batches(5))
    printed = capsys.readouterr().out
    assert all(task in printed for task in TASKS)
    content = yaml.safe_load((tmp_path / "lightning_logs" / "version_0" / "loss_weights.yaml").read_text())
    assert content["method"] == "GradNorm"
    assert content["settings"]["lr"] == 0.1
    assert content["steps"] == 10
    for k, task in enumerate(TASKS):
        applied = [step[0][k] for step in watcher.steps]
        row = content["tasks"][task]
        mean = sum(applied) / 10
        assert row["final"] == callback.weights[task]
        assert row["mean"] == pytest.approx(mean)
        assert row["std"] == pytest.approx(math.sqrt(sum((w - mean) ** 2 for w in applied) / 10))


def test_the_table_can_be_left_out(tmp_path, capsys):
    quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)], logger=CSVLogger(tmp_path)).fit(
        TrunkAndHeads(), batches(2)
    )
    assert "GradNorm" not in capsys.readouterr().out
    assert not list(tmp_path.rglob("loss_weights.yaml"))


def test_the_engine_in_use_is_said_once(tmp_path, caplog):
    with caplog.at_level("INFO"):
        quiet_trainer(tmp_path, callbacks=[GradNormCallback(summary=False)]).fit(TrunkAndHeads(), batches(5))
    said = [record.message for record in caplog.records if "compares the tasks' gradients on" in record.message]
    assert len(said) == 1
    assert "trunk.2.weight (10, 10): 100 entries" in said[0]
    assert "name another by shared_layer" in said[0]
    assert "'joint' engine" in said[0]
