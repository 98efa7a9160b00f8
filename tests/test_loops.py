"""Other loops than a Trainer's: by hand and Lightning Fabric come to what the callback comes to on the same batches."""

import pytest
import torch
import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy
from torch import nn

from lightning_gradnorm import BalancingSession, GradNorm, Loop, RankAgreement, total_loss
from tests.callbacks.two_processes import WORLD, on_two_processes
from tests.helpers import in_another_thread, same_state
from tests.loops import SCALES, Network, Run, assert_close, balancer, by_the_callback, moved, of_rank, optimizer_of, rows, same


def by_hand(x, *, size=8, accumulate=1, network=None, session=None, scale=1):
    """Bare PyTorch; ``scale``: of the backward, as a GradScaler's."""
    network = network or Network()
    session = session or BalancingSession(balancer(), network)
    optimizer, run = optimizer_of(network), Run()
    for k, batch in enumerate(x.split(size)):
        with session.batch():
            loss = network(batch)["loss"] / accumulate
            session.before_backward(loss)
            (scale * loss).backward()
            session.after_backward()
        if (k + 1) % accumulate == 0:
            for gradient in [p.grad for p in network.parameters() if p.grad is not None]:
                gradient /= scale
            optimizer.step()
            optimizer.zero_grad()
            session.step()
            run.weights.append(session.balancer.weights)
    return run.ended(network, session)


def by_fabric(fabric, x, *, size=8, accumulate=1, session=None, state=None, part=slice(None)):
    """``state``: what is saved or loaded with the run."""
    module = Network()
    network, optimizer = fabric.setup(module, optimizer_of(module))
    session = session or BalancingSession(balancer(), module)
    if state is not None:
        fabric.load(state, {"network": network, "optimizer": optimizer, "session": session})
    run = Run()
    for k, batch in enumerate(x.split(size)[part]):
        whole = (k + 1) % accumulate == 0
        with fabric.no_backward_sync(network, enabled=not whole), session.batch():
            loss = network(batch)["loss"] / accumulate
            session.before_backward(loss)
            fabric.backward(loss)
            session.after_backward()
        if whole:
            optimizer.step()
            optimizer.zero_grad()
            session.step()
            run.weights.append(session.balancer.weights)
    run.saved = {"network": network, "optimizer": optimizer, "session": session}
    return run.ended(module, session)


def one_process(**settings):
    return Fabric(accelerator="cpu", devices=1, **settings)


LOOPS = {"by hand": by_hand, "Fabric": lambda x, **settings: by_fabric(one_process(), x, **settings)}


@pytest.fixture(params=LOOPS.values(), ids=LOOPS)
def loop(request):
    return request.param


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_equals_the_callback_bit_for_bit(tmp_path, loop, accumulate):
    x = rows()
    found = loop(x, accumulate=accumulate)
    expected = by_the_callback(tmp_path, x.split(8), accumulate_grad_batches=accumulate)
    assert len(found.weights) == 6 // accumulate
    assert same(found, expected)
    assert moved(found)
    assert same_state(found.state["balancer"], expected.state["balancer"])


def test_accumulated_batches_are_one_large_batch(loop, float64):
    x = rows().double()
    assert_close(vars(loop(x, size=4, accumulate=4)), loop(x, size=16), rel=1e-9)


def test_a_task_that_is_absent_from_batches_is_measured_where_it_is(tmp_path, loop):
    x = rows(absent=[1, 2])
    found = loop(x, accumulate=1)
    assert same(found, by_the_callback(tmp_path, x.split(8)))
    assert found.weights[0]["middle"] != found.weights[3]["middle"]
    assert same(loop(x, accumulate=2), by_the_callback(tmp_path, x.split(8), accumulate_grad_batches=2))


def test_a_backward_that_the_loop_scales_is_the_same():
    assert same(by_hand(rows(), scale=1024), by_hand(rows()))


def test_in_half_precision_too(tmp_path):
    found = by_fabric(one_process(precision="bf16-mixed"), rows())
    batches = rows().bfloat16().split(8)  # Fabric rounds the inputs, a Trainer does not
    assert same(found, by_the_callback(tmp_path, batches, precision="bf16-mixed"))
    assert moved(found)


def test_fabric_saves_and_resumes_exactly(tmp_path):
    fabric, x = one_process(), rows()
    whole = by_fabric(fabric, x)
    first = by_fabric(fabric, x, part=slice(3))
    fabric.save(tmp_path / "run.ckpt", first.saved)
    second = by_fabric(fabric, x, part=slice(3, None), state=tmp_path / "run.ckpt")
    assert first.weights + second.weights == whole.weights
    assert same_state(second.state, whole.state)
    assert all(torch.equal(second.parameters[name], value) for name, value in whole.parameters.items())


def test_outside_a_batch_and_without_gradients_it_is_the_plain_sum(loop):
    network = Network()
    session = BalancingSession(balancer(), network)
    by_hand(rows(), network=network, session=session)
    x = rows(1)
    plain = sum(network.losses(x).values())
    assert torch.equal(network(x)["loss"], plain)
    with session.batch():
        weighed = network(x)["loss"]
        with torch.no_grad():
            assert torch.equal(network(x)["loss"], plain)
            assert torch.equal(session.total(network.losses(x)), plain)
        assert not torch.equal(weighed, plain)
        session.before_backward(weighed)
    assert torch.equal(session.total(network.losses(x)), plain)


# -- a batch -----------------------------------------------------------------------------------------------------------------


def test_batches_of_two_sessions_do_not_mix():
    networks = Network(), Network()
    sessions = [BalancingSession(balancer(), network) for network in networks]
    x = rows(1)
    with sessions[0].batch():
        with sessions[1].batch():
            inner = networks[1](x)["loss"]
            sessions[1].before_backward(inner)
        outer = networks[0](x)["loss"]
        sessions[0].before_backward(outer)
        outer.backward()
        sessions[0].after_backward()
    assert [session.totals for session in sessions] == [1, 1]
    assert sessions[0].step() is not None


def test_a_total_whose_backward_is_not_read_is_told():
    network = Network()
    session = BalancingSession(balancer(), network)
    with (
        pytest.warns(UserWarning, match=r"\['small', 'middle', 'large'\], were weighed, but no before_backward"),
        session.batch(),
    ):
        network(rows(1))["loss"].backward()
    assert session.step() is None


def test_a_batch_that_hands_nothing_over_is_told():
    network = Network()
    session = BalancingSession(balancer(), network)
    with pytest.warns(UserWarning, match="A batch handed no losses over, so BalancingSession has nothing"), session.batch():
        in_another_thread(lambda: network(rows(1)))


def test_without_a_run_there_is_no_batch():
    session = BalancingSession(balancer(), Network())
    session.close()
    for closed in (session, BalancingSession(balancer())):
        with pytest.raises(RuntimeError, match="No run is open here"), closed.batch():
            pass


class Parts(Network):
    """Its losses by each of the other ways in: a submodule that returns them as a dict, weights that it multiplies by."""

    def __init__(self):
        super().__init__()
        self.returns = Returns()
        self.weights = dict.fromkeys(SCALES, 1.0)

    def forward(self, x):
        losses = self.returns(self.losses(x))
        return {"loss": sum(self.weights[task] * loss for task, loss in losses.items())}


class Returns(nn.Module):
    def forward(self, losses):
        return dict(losses)


def test_every_way_in_is_the_same_in_a_batch():
    expected = by_hand(rows())
    weighed, returned = Parts(), Parts()
    session = BalancingSession(balancer(), weighed)
    weighed.weights = {task: session.weight(task) for task in SCALES}
    for network, its in ((weighed, session), (returned, BalancingSession(balancer(), returned, losses_of="returns"))):
        found = by_hand(rows(), network=network, session=its)
        assert same(found, expected)


def test_a_batch_that_ends_in_an_error_is_forgotten_with_its_step():
    network, x = Network(), rows(2)
    session = BalancingSession(balancer(), network)

    def fails():
        with session.batch():
            session.before_backward(network(x[:8])["loss"])
            raise MemoryError

    with pytest.raises(MemoryError):
        fails()
    assert not session.window and not session.noted
    assert total_loss({"a": torch.tensor(2.0)}) == 2
    with session.batch():
        loss = network(x[8:])["loss"]
        session.before_backward(loss)
        loss.backward()
        session.after_backward()
    losses = network.losses(x[8:])
    assert dict(zip(losses, session.step().measurement.losses.tolist(), strict=True)) == pytest.approx(
        {task: loss.item() for task, loss in losses.items()}
    )


# -- several processes -------------------------------------------------------------------------------------------------------


def fabric_on_a_rank(rank, path):
    fabric = Fabric(accelerator="cpu", devices=WORLD, strategy=DDPStrategy(find_unused_parameters=True))
    fabric.launch()
    found = {}
    for name, x, accumulate in two_process_cases():
        mine = torch.cat([batch.chunk(WORLD)[rank] for batch in x.split(8)])
        found[name] = of_rank(by_fabric(fabric, mine, size=4, accumulate=accumulate))
    torch.save(found, path)


def two_process_cases():
    return [("plain", rows(), 1), ("accumulated", rows(), 2), ("absent", rows(absent=[1]), 2)]


@pytest.mark.slow
def test_two_processes_equal_one_on_the_same_batches(tmp_path):
    one, other = on_two_processes(fabric_on_a_rank, tmp_path)
    for name, x, accumulate in two_process_cases():
        assert one[name]["weights"] == other[name]["weights"]
        assert_close(one[name], by_hand(x, accumulate=accumulate))


def session_on_a_rank(rank, path):
    network = Network()
    alone = BalancingSession(GradNorm(), network)._loop.ranks
    torch.distributed.init_process_group("gloo", rank=rank, world_size=WORLD)
    together = BalancingSession(GradNorm(), network)._loop.ranks
    session = BalancingSession(GradNorm())
    session.open(Loop(network))
    torch.save([alone is None, isinstance(together, RankAgreement), session._loop.ranks is None], path)


@pytest.mark.slow
def test_ranks_agree_by_themselves_where_there_are_several(tmp_path):
    assert on_two_processes(session_on_a_rank, tmp_path) == [[True] * 3] * WORLD
