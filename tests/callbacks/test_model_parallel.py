"""FSDP2 under ``ModelParallelStrategy``: two processes against one process on the same global batches."""

import pytest
import torch
import torch.distributed
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import nn
from torch.distributed.fsdp import fully_shard

from tests.callbacks.distributed_worker import STEPS, Scenario, Watch, fit_module, global_batches, part_of
from tests.callbacks.test_distributed import assert_same_run
from tests.callbacks.two_processes import WORLD, on_two_processes

pytestmark = pytest.mark.slow


def sharded_whole(module, mesh):
    """The trunk as one, its layers within: these are back in shards when the forward is over."""
    for layer in (module.trunk[0], module.trunk[2], module.trunk, *module.heads.values()):
        fully_shard(layer, mesh=mesh)


def gathered_for_the_backward(module, mesh):
    """The same, but for the shared layer, whose parameters stay whole from the forward to the backward."""
    fully_shard(module.trunk[2], mesh=mesh, reshard_after_forward=False)
    sharded_whole_but_the_last(module, mesh)


def sharded_whole_but_the_last(module, mesh):
    for layer in (module.trunk[0], module.trunk, *module.heads.values()):
        fully_shard(layer, mesh=mesh)


def each_for_itself(module, mesh):
    """Layers that training_step calls one by one are FSDP roots, which torch keeps whole for the backward."""
    for layer in (*module.trunk, *module.heads.values()):
        if isinstance(layer, nn.Linear):
            fully_shard(layer, mesh=mesh)


def shared_layer_left_out(module, mesh):
    """All but the shared layer. Nobody averages its gradients over the ranks then, so the module does."""
    for layer in (module.trunk[0], *module.heads.values()):
        fully_shard(layer, mesh=mesh)
    for parameter in module.trunk[2].parameters():
        parameter.register_post_accumulate_grad_hook(average_over_the_ranks)


def average_over_the_ranks(parameter):
    torch.distributed.all_reduce(parameter.grad)
    parameter.grad /= WORLD


class Sharded(Scenario):
    """The distributed tests' module, sharded where it is told to be."""

    def __init__(self, shard=None, layer="trunk.2"):
        super().__init__("plain")
        self.shard, self.layer, self.is_sharded = shard, layer, False

    def shared_layer(self):
        return self.layer

    def configure_model(self):
        if self.shard is not None and not self.is_sharded:
            self.is_sharded = True
            self.shard(self, self.device_mesh["data_parallel"])


# case → (how it is sharded, shared_layer(), callback settings, Trainer settings)
SAME_AS_ONE_PROCESS = {
    "gathered for the backward": (gathered_for_the_backward, "trunk.2", {}, {}),
    "gathered, found from the graph": (each_for_itself, None, {}, {}),
    "gathered, per-task engine": (gathered_for_the_backward, "trunk.2", {"engine": "per_task"}, {}),
    "gathered, accumulation": (each_for_itself, "trunk.2", {}, {"accumulate_grad_batches": 4}),
    "left out of FSDP": (shared_layer_left_out, "trunk.2", {}, {}),
    "left out of FSDP, found from the graph": (shared_layer_left_out, None, {}, {}),
    "features": (sharded_whole, "trunk.2", {"norm_of": "features"}, {}),
    "features, accumulation": (sharded_whole, "trunk.2", {"norm_of": "features"}, {"accumulate_grad_batches": 4}),
}
REFUSED = {
    "sharded": (sharded_whole, "trunk.2", {}, {}),
    "sharded, named by its weight": (sharded_whole, "trunk.2.weight", {}, {}),
    "sharded, to be found from the graph": (sharded_whole, None, {}, {}),
}


def two_dimensional(tensor_parallel_size=1):
    sizes = {"data_parallel_size": WORLD // tensor_parallel_size, "tensor_parallel_size": tensor_parallel_size}
    return ModelParallelStrategy(**sizes, process_group_backend="gloo")


def run(rank, path):
    results = {}
    for name, (shard, layer, settings, trainer_settings) in (SAME_AS_ONE_PROCESS | REFUSED).items():
        arguments = (Sharded(shard, layer), Watch(**settings), path.parent, part_of(rank), two_dimensional())
        results[name] = result_of(fit_module, *arguments, **trainer_settings)
    results["tensor parallel"] = result_of(
        fit_module, Sharded(sharded_whole), Watch(), path.parent, part_of(rank), two_dimensional(WORLD)
    )
    torch.save(results | two_epochs_whole_and_resumed(rank, path.parent), path)


def two_epochs_whole_and_resumed(rank, folder):
    """Each epoch saved by the whole run, the second once more from the first's checkpoint."""

    def fit(**settings):
        module, callback = Sharded(each_for_itself), Watch()
        return result_of(fit_module, module, callback, folder, part_of(rank), two_dimensional(), max_epochs=2, **settings)

    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    whole = fit(callbacks=[saving], enable_checkpointing=True)
    return {"whole": whole, "resumed": fit(ckpt_path=folder / "epoch=0.ckpt")}


def result_of(function, *arguments, **settings):
    try:
        return function(*arguments, **settings)
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Results of all cases on both ranks."""
    return on_two_processes(run, tmp_path_factory.mktemp("fsdp"))


@pytest.mark.feature(
    "`ModelParallelStrategy` with FSDP2, the shared layer whole until the backward, or `norm_of='features'`",
    "supported",
    "two processes equal one on the same global batch",
)
@pytest.mark.parametrize("case", SAME_AS_ONE_PROCESS)
def test_equal_to_one_process_on_the_same_global_batch(ranks, case, tmp_path):
    _, layer, settings, trainer_settings = SAME_AS_ONE_PROCESS[case]
    alone = fit_module(Sharded(None, layer), Watch(**settings), tmp_path, global_batches(), "auto", **trainer_settings)
    assert max(abs(w - 1) for w in alone["history"][-1][0].values()) > 1e-3
    for rank in ranks:
        assert_same_run(rank[case], alone)
    assert ranks[0][case]["history"] == ranks[1][case]["history"]


@pytest.mark.feature(
    "FSDP2, the shared layer in shards when the backward begins",
    "refused",
    "“Take norm_of='features' …; or … fully_shard(layer, reshard_after_forward=False)”",
)
@pytest.mark.parametrize("case", REFUSED)
def test_a_sharded_shared_layer_is_refused_with_two_ways_out(ranks, case):
    named = {"sharded": "trunk.2.weight, trunk.2.bias.", "sharded, named by its weight": "trunk.2.weight."}
    for rank in ranks:
        error = rank[case]["error"]
        assert error.startswith("ValueError: Each task's gradient on the shared layer is read from whole parameters")
        assert f"each rank held only its shard of {named.get(case, 'trunk.0.weight, trunk.2.weight.')} Take" in error
        assert "Take norm_of='features' with a shared_layer() that names the module" in error
        assert "fully_shard(layer, reshard_after_forward=False)" in error


def test_tensor_parallelism_is_refused_early(ranks):
    for rank in ranks:
        assert (
            "tensor_parallel_size=1); not with ModelParallelStrategy(tensor_parallel_size=2)."
            in rank["tensor parallel"]["error"]
        )
        assert "untested_strategies=True" in rank["tensor parallel"]["error"]


@pytest.mark.feature(
    "`ModelParallelStrategy`: checkpoint and resume", "supported", "equals the uninterrupted run, step by step"
)
def test_resumed_equals_uninterrupted(ranks):
    for rank in ranks:
        assert len(rank["whole"]["history"]) == 2 * STEPS
        assert rank["resumed"]["history"] == rank["whole"]["history"][STEPS:]
        assert torch.equal(rank["resumed"]["parameters"], rank["whole"]["parameters"])
