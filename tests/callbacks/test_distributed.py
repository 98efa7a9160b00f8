"""Two processes under DDP against one process on the same global batches."""

from functools import partial

import pytest
import torch

from tests.callbacks import distributed_worker as worker
from tests.callbacks.distributed_worker import CASES, SAME_AS_ONE_PROCESS, STEPS, Scenario, fit, global_batches
from tests.callbacks.test_every_method import traces_by_hand
from tests.callbacks.two_processes import on_two_processes
from tests.helpers import SCALES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of all cases on both ranks."""
    results = on_two_processes(worker.run, tmp_path_factory.mktemp("ddp"))
    unexpected = {case: found["error"] for result in results for case, found in result.items() if "error" in found}
    unexpected.pop("new task on one rank", None)
    assert not unexpected
    return results


@pytest.mark.parametrize("case", [case for case in CASES if case != "new task on one rank"])
def test_ranks_hold_identical_weights_and_parameters(ranks, case):
    one, other = ranks[0][case], ranks[1][case]
    assert [weights for weights, _ in one["history"]] == [weights for weights, _ in other["history"]]
    if case != "not a number on one rank":
        assert torch.equal(one["parameters"], other["parameters"])
    assert max(abs(w - 1) for w in one["history"][-1][0].values()) > 1e-3


@pytest.mark.feature(
    '`strategy="ddp"`, also with `find_unused_parameters`, `gradient_as_bucket_view`, `static_graph`; accumulation, '
    "also with a short last window",
    "supported",
    "two processes equal one on the same global batch",
)
@pytest.mark.parametrize("case", SAME_AS_ONE_PROCESS)
def test_equal_to_one_process_on_the_same_global_batch(ranks, case, tmp_path):
    assert_same_run(ranks[0][case], fit(case, tmp_path, global_batches(), "auto"))


def assert_same_run(found, expected):
    assert len(expected["history"]) == STEPS
    for (weights, norms), (its_weights, its_norms) in zip(found["history"], expected["history"], strict=True):
        assert weights == pytest.approx(its_weights, rel=1e-5)
        assert norms == (None if its_norms is None else pytest.approx(its_norms, rel=1e-4))
    assert found["totals"] == pytest.approx(expected["totals"], rel=1e-5, nan_ok=True), "also on steps that are not measured"
    torch.testing.assert_close(found["parameters"], expected["parameters"], rtol=1e-4, atol=1e-5)


@pytest.mark.feature("indicators and per-point masks under DDP", "supported", "two processes equal one; one collective more")
def test_indicators_and_masks_equal_those_of_one_process(tmp_path):
    one, other = on_two_processes(worker.run_other_methods, tmp_path, timeout=120)
    alone = worker.fit_module(worker.OtherMethods("plain"), worker.WatchOther(), tmp_path, global_batches(), "auto")
    assert one["history"] == other["history"]
    assert_same_run(one, alone)
    assert len({round(mask, 6) for mask in one["history"][-1][1]}) > 4


@pytest.mark.feature("traces of tangent kernels under DDP", "supported", "signs of its own on each rank; one mean")
def test_the_ranks_traces_are_averaged(tmp_path):
    one, other = on_two_processes(worker.run_residuals, tmp_path, timeout=120)
    assert one["history"] == other["history"] and torch.equal(one["parameters"], other["parameters"])
    assert one["skipped"] == 0 and len(one["history"]) == STEPS
    module, traces = worker.Residuals("plain"), []
    for rank in range(2):
        points = module.losses(worker.part_of(rank)[0])
        if rank == 1:
            del points["middle"]  # it is absent there
        found = traces_by_hand(points, list(module.trunk[2].parameters()), 0, rank)
        traces.append(dict(zip(points, found.tolist(), strict=True)))
    expected = {task: (trace + traces[1].get(task, trace)) / 2 for task, trace in traces[0].items()}
    assert dict(zip(SCALES, one["history"][0][1], strict=True)) == pytest.approx(expected, rel=1e-4)


@pytest.mark.feature("TorchJD's weightings and scalarisers under DDP", "supported", "the same weights on every rank")
def test_methods_of_torchjd_equal_those_of_one_process(tmp_path):
    assert_as_one_process(worker.run_of_torchjd, worker.OF_TORCHJD, tmp_path)


def test_methods_of_losses_equal_those_of_one_process(tmp_path):
    assert_as_one_process(worker.run_of_losses, worker.OF_LOSSES, tmp_path)


def assert_as_one_process(run, methods, tmp_path):
    one, other = on_two_processes(run, tmp_path, timeout=300)
    for name, make in methods.items():
        assert one[name]["history"] == other[name]["history"], name
        assert torch.equal(one[name]["parameters"], other[name]["parameters"]), name
        torch.manual_seed(5)
        alone = worker.fit_module(worker.Scenario("plain"), worker.WatchMethod(make), tmp_path, global_batches(), "auto")
        assert len(alone["history"]) == STEPS
        if name in ("STCH", "GO4Align"):
            continue  # the weights are of each rank's own losses
        for weights, its_weights in zip(one[name]["history"], alone["history"], strict=True):
            assert weights == pytest.approx(its_weights, rel=1e-4), name
        torch.testing.assert_close(one[name]["parameters"], alone["parameters"], rtol=1e-4, atol=1e-5)


@pytest.mark.feature('`strategy="ddp"`', "supported", "one collective per update, or step that is logged")
@pytest.mark.parametrize("case", [case for case in CASES if case != "new task on one rank"])
def test_one_collective_per_update_or_logged_step(ranks, case):
    # While no rank knows the layer there is nothing to add up.
    updates = {"accumulation": 3, "short last window": 2, "layer found late": STEPS - 2}.get(case, STEPS)
    assert ranks[0][case]["collectives"] == ranks[1][case]["collectives"] == updates


@pytest.mark.feature("a task absent on one rank", "supported", "its mean is over the ranks that have it")
def test_a_task_absent_on_one_rank_is_measured_where_it_is(ranks):
    module = Scenario("plain")
    batch = global_batches()[0]
    norms = []
    for task in SCALES:
        rows = batch[:4] if task == "middle" else batch
        (gradient,) = [torch.autograd.grad(module.losses(rows)[task], list(module.trunk[2].parameters()))]
        norms.append(torch.cat([g.flatten() for g in gradient]).norm().item())
    assert dict(zip(_order(ranks), ranks[0]["absent on one rank"]["history"][0][1], strict=True)) == pytest.approx(
        dict(zip(SCALES, norms, strict=True)), rel=1e-4
    )


@pytest.mark.feature("a shared layer that one rank can find before the others", "supported", "the others take it, by its name")
def test_a_layer_that_one_rank_has_found_is_taken_by_the_other(ranks):
    for rank in ranks:
        history = rank["layer found on one rank"]["history"]
        assert all(len(weights) == len(norms) == len(SCALES) for weights, norms in history)
        assert len({tuple(weights.values()) for weights, _ in history}) == STEPS


def _order(ranks):
    return list(ranks[0]["absent on one rank"]["history"][0][0])


@pytest.mark.feature("a NaN on one rank", "supported", "every rank skips the update")
def test_not_a_number_on_one_rank_is_skipped_by_both(ranks):
    for rank in ranks:
        result = rank["not a number on one rank"]
        before, after = result["history"][1][0], result["history"][2][0]
        assert before == after
        assert result["skipped"] >= 1


@pytest.mark.feature("a task that first appears later in a distributed run", "refused", "“Declare all of them: tasks=[…]”")
def test_a_new_task_on_one_rank_is_an_error_that_says_to_declare_it(ranks):
    error = ranks[1]["new task on one rank"]["error"]
    assert "'surprise' appeared after the first step of a distributed run" in error
    assert "tasks=['small', 'middle', 'large', 'odd', 'surprise']" in error


@pytest.mark.feature(
    "one rank of several fails",
    "supported",
    "the others end with an error, not in a hang; the weights are of the last whole step",
)
@pytest.mark.parametrize("hook", ["training_step", "on_before_optimizer_step"])
def test_one_rank_fails_and_the_other_does_not_hang(tmp_path, hook):
    """Before the ranks meet in the backward, and after it, where they meet next in the callback."""
    survivor, failed = on_two_processes(partial(worker.run_until_one_rank_stops, hook), tmp_path, timeout=120)
    assert failed["error"] == "OSError: this rank's disk is gone"
    assert "Error" in survivor["error"]
    alone = fit("plain", tmp_path, global_batches()[:2], "auto")
    for rank in (survivor, failed):
        assert rank["steps"] == len(rank["history"]) == 2
        assert rank["weights"] == pytest.approx(alone["history"][-1][0], rel=1e-5)
        assert rank["left"] == (0, False)
