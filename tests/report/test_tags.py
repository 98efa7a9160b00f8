"""The names of what is logged, and that TensorBoard's charts find them."""

import itertools
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch.utils.tensorboard import SummaryWriter

from lightning_gradnorm.report.tags import CHARTS, custom_scalars_layout, per_pair, per_task, totals

TASKS = ["depth", "größe 4", "u/x (t=0)", "温度", "loss_weight", "-", "a.b"]
PER_TASK = ["loss_weight", "task_loss", "grad_norm", "target_norm", "loss_ratio", "inverse_rate"]
CHART_OF = {
    "loss_weight": "loss weights",
    "grad_norm": "weighted gradient norms and their targets",
    "target_norm": "weighted gradient norms and their targets",
    "loss_ratio": "loss ratios and inverse rates",
    "inverse_rate": "loss ratios and inverse rates",
    "task_loss": "task losses",
    "grad_cosine": "gradient cosines",
    "total_loss": "total loss",
}


def all_tags(tasks=TASKS) -> dict[str, torch.Tensor]:
    values = torch.arange(1.0, 1 + len(tasks))
    tags = {tag: value for name in PER_TASK for tag, value in per_task(name, tasks, values).items()}
    return tags | per_pair("grad_cosine", tasks, torch.outer(values, values)) | dict(totals(values, values))


def charts_that_show(tag: str, charts=CHARTS) -> list[str]:
    """As TensorBoard's Custom Scalars decides: by re.match of each of a chart's expressions."""
    return [chart for chart, patterns in charts.items() if any(re.match(pattern, tag) for pattern in patterns)]


def test_one_scalar_per_task():
    values = torch.tensor([1.0, 2.0, 3.0])
    assert per_task("loss_weight", ["a", "b c", "d/e"], values) == {
        "loss_weight/a": values[0],
        "loss_weight/b_c": values[1],
        "loss_weight/d/e": values[2],
    }
    with pytest.raises(ValueError, match="zip"):
        per_task("loss_weight", ["a", "b"], values)


def test_one_scalar_per_pair():
    tasks, values = ["a", "b c", "d"], torch.tensor([[1.0, 0.1, 0.2], [0.1, 1.0, 0.3], [0.2, 0.3, 1.0]])
    got = {tag: round(value.item(), 6) for tag, value in per_pair("grad_cosine", tasks, values).items()}
    assert got == {"grad_cosine/a_b_c": 0.1, "grad_cosine/a_d": 0.2, "grad_cosine/b_c_d": 0.3}
    assert per_pair("grad_cosine", ["a"], torch.ones(1, 1)) == {}


def test_totals_are_the_two_sums():
    both = totals(torch.tensor([0.5, 2.0]), torch.tensor([4.0, 3.0]))
    assert both == {"total_loss/weighted": torch.tensor(8.0), "total_loss/unweighted": torch.tensor(7.0)}


def test_every_tag_is_on_one_chart_and_on_the_right_one():
    for tag in all_tags():
        assert charts_that_show(tag) == [CHART_OF[tag.split("/")[0]]], tag
    assert {chart for tag in all_tags() for chart in charts_that_show(tag)} == set(CHARTS), "no chart stays empty"


@pytest.mark.parametrize(
    "tag", ["epoch", "lr-Adam", "train/loss_weight/a", "loss_weights/a", "val/task_loss/a", "my_grad_norm/a"]
)
def test_the_charts_show_nothing_of_others(tag):
    assert charts_that_show(tag) == []


@given(st.lists(st.sampled_from(["depth", "grad_norm", "total_loss", "a/b", "loss weight", "x"]), min_size=1, unique=True))
def test_a_task_may_be_named_like_a_quantity(tasks):
    for tag in all_tags(tasks):
        assert len(charts_that_show(tag)) == 1


def test_what_the_event_file_holds(tmp_path):
    """Written as the callback does, and read back as TensorBoard does."""
    with SummaryWriter(tmp_path) as writer:
        writer.add_custom_scalars(
            custom_scalars_layout(
                [f"{tag}/a" for tag in ("loss_weight", "grad_norm", "loss_ratio", "task_loss", "grad_cosine")]
                + ["total_loss/weighted"]
            )
        )
        for tag, value in all_tags().items():
            writer.add_scalar(tag, value, 1)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (plugin,) = events.PluginTagToContent("custom_scalars")
    proto = events.Tensors(plugin)[0].tensor_proto
    layout = layout_pb2.Layout.FromString(proto.string_val[0])

    (category,) = layout.category
    assert category.title == "loss balancing"
    charts = {chart.title: list(chart.multiline.tag) for chart in category.chart}
    assert charts == CHARTS
    written = events.Tags()["scalars"]
    assert sorted(written) == sorted(all_tags())
    for tag in written:
        assert charts_that_show(tag, charts) == [CHART_OF[tag.split("/")[0]]]
    shown = [tag for tag in written if tag.startswith("loss_weight/")]
    assert len(shown) == len(TASKS), "all weights on one chart"


def test_pairs_do_not_hide_each_other():
    """One scalar per pair also where a name contains the sign that joins two names."""
    tasks = ["a", "b_c", "a_b", "c"]
    values = torch.arange(16.0).reshape(4, 4)
    values = values + values.T
    got = sorted(value.item() for value in per_pair("grad_cosine", tasks, values).values())
    assert got == sorted(values[i, j].item() for i, j in itertools.combinations(range(4), 2))
