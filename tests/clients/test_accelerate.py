"""Hugging Face accelerate: its loop comes to what the callback comes to on the same batches."""

import os

import pytest

pytest.importorskip("accelerate", reason="accelerate is not installed; make clients installs it apart")

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, GradientState
from torch.utils.data import DataLoader

from lightning_gradnorm import BalancingSession
from tests.callbacks.two_processes import WORLD, on_two_processes
from tests.helpers import same_state
from tests.loops import Network, Run, assert_close, balancer, by_the_callback, moved, of_rank, optimizer_of, rows, same
from tests.test_docs import blocks

pytestmark = pytest.mark.client


@pytest.fixture(autouse=True)
def _another_accelerator():
    """Accelerators of one process share their settings."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def train(x, *, size=8, accumulate=1, resume=None, save=None, stop=None, **settings):
    """An accelerate loop as its documentation has it, with the session's lines.

    Args:
        x: the rows.
        size: of a batch.
        accumulate: how many batches a step has.
        resume: folder of a state to go on from.
        save: folder to leave a state in at the end.
        stop: after how many batches.
        settings: of the Accelerator.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate, **settings)
    module = Network()
    network, optimizer, loader = accelerator.prepare(module, optimizer_of(module), DataLoader(x, size))
    session, run = BalancingSession(balancer(), module), Run()
    accelerator.register_for_checkpointing(session)
    if resume is not None:
        accelerator.load_state(resume)
        loader = accelerator.skip_first_batches(loader, 3)
    for k, batch in enumerate(loader):
        if k == stop:
            break
        with accelerator.accumulate(network), session.batch():
            loss = network(batch)["loss"]
            session.before_backward(loss)
            accelerator.backward(loss)
            session.after_backward()
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            session.step()
            run.weights.append(session.balancer.weights)
    if save is not None:
        accelerator.save_state(save)
    return run.ended(module, session)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("absent", [[], [1, 2]], ids=["every task in every batch", "a task absent from some"])
def test_it_equals_the_callback_bit_for_bit(tmp_path, accumulate, absent):
    x = rows(absent=absent)
    found = train(x, accumulate=accumulate)
    assert len(found.weights) == 6 // accumulate
    assert same(found, by_the_callback(tmp_path, x.split(8), accumulate_grad_batches=accumulate))
    assert moved(found)


def test_accumulated_batches_are_one_large_batch(float64):
    x = rows().double()
    assert_close(vars(train(x, size=4, accumulate=4)), train(x, size=16), rel=1e-9)


def test_a_last_window_that_is_short_is_a_step(tmp_path):
    found = train(rows(5), accumulate=2)
    expected = by_the_callback(tmp_path, rows(5).split(8), accumulate_grad_batches=2)
    assert len(found.weights) == 3
    assert same(found, expected)


def test_in_half_precision_too(tmp_path):
    found = train(rows(), mixed_precision="bf16")
    assert same(found, by_the_callback(tmp_path, rows().split(8), precision="bf16-mixed"))
    assert moved(found)


def test_its_saved_state_has_the_session_and_resumes_exactly(tmp_path):
    whole = train(rows())
    first = train(rows(), stop=3, save=tmp_path)
    second = train(rows(), resume=tmp_path)
    assert first.weights + second.weights == whole.weights
    assert same_state(second.state, whole.state)
    assert all(torch.equal(second.parameters[name], value) for name, value in whole.parameters.items())


def test_the_block_of_the_page_of_loops_runs():
    (library,) = [block for block in blocks("loops.md") if "from accelerate import" in block]
    names = {}
    for block in (blocks("loops.md")[0], library):
        exec(compile(block, "loops.md", "exec"), names)
    assert names["session"].balancer.steps == 8
    assert names["session"].balancer.weights["sold"] > 1 > names["session"].balancer.weights["price"]


@pytest.mark.parametrize("example", ["accelerate_loop"], indirect=True)
def test_the_example_trains_both_ways(example, tmp_path, capsys):
    example.main(["--epochs", "2", "--bf16", "--out", str(tmp_path)])
    printed = capsys.readouterr().out
    for word in ("digit", "pixels", "ink", "equal weights", "GradNorm's weight"):
        assert word in printed


def on_a_rank(rank, path):
    os.environ.update(RANK=str(rank), LOCAL_WORLD_SIZE=str(WORLD))
    unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    found = {}
    for name, x, accumulate in two_process_cases():
        # accelerate deals whole batches out to the ranks in turn
        found[name] = of_rank(train(x, size=4, accumulate=accumulate, kwargs_handlers=[unused]))
    torch.save(found, path)


def two_process_cases():
    return [("plain", rows(), 1), ("accumulated", rows(), 2), ("absent", rows(absent=[1]), 2)]


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_batches(tmp_path):
    one, other = on_two_processes(on_a_rank, tmp_path)
    for name, x, accumulate in two_process_cases():
        assert one[name]["weights"] == other[name]["weights"]
        assert_close(one[name], train(x, accumulate=accumulate))
