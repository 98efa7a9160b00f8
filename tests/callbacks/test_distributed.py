"""Two processes under DDP against one process on the same global batches."""

import socket

import pytest
import torch
import torch.multiprocessing

from tests.callbacks import distributed_worker as worker
from tests.callbacks.distributed_worker import CASES, SAME_AS_ONE_PROCESS, STEPS, Scenario, fit, global_batches
from tests.helpers import SCALES

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of all cases on both ranks."""
    folder = tmp_path_factory.mktemp("ddp")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    processes = [context.Process(target=worker.run, args=(rank, port, str(folder)), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=400)
        if process.is_alive():
            process.kill()
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]
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
    '`strategy="ddp"`, also with `find_unused_parameters`, `gradient_as_bucket_view`, `static_graph`',
    "supported",
    "two processes equal one on the same global batch",
)
@pytest.mark.parametrize("case", SAME_AS_ONE_PROCESS)
def test_equal_to_one_process_on_the_same_global_batch(ranks, case, tmp_path):
    alone = fit(case, tmp_path, global_batches(), "auto")
    assert len(alone["history"]) == STEPS
    for (weights, norms), (expected, expected_norms) in zip(ranks[0][case]["history"], alone["history"], strict=True):
        assert weights == pytest.approx(expected, rel=1e-5)
        assert norms == (None if expected_norms is None else pytest.approx(expected_norms, rel=1e-4))
    torch.testing.assert_close(ranks[0][case]["parameters"], alone["parameters"], rtol=1e-4, atol=1e-5)


@pytest.mark.feature('`strategy="ddp"`', "supported", "one collective per update")
@pytest.mark.parametrize("case", [case for case in CASES if case != "new task on one rank"])
def test_one_collective_per_update(ranks, case):
    updates = {"accumulation": 3, "update_every": 3}.get(case, STEPS)
    assert ranks[0][case]["collectives"] == ranks[1][case]["collectives"] == updates


@pytest.mark.feature("a task absent on one rank", "supported", "its mean is over the ranks that have it")
def test_a_task_absent_on_one_rank_is_measured_where_it_is(ranks):
    torch.manual_seed(0)
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
