"""torch.compile around the shared layer, below it and above it."""

import copy

import pytest
import torch

from lightning_gradnorm.gradients import CompiledSharedLayerError, UnreachedSharedLayerError
from tests.callbacks.watching import OnTensors, Watch, assert_same_history, loader, train

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # the compiler warns of itself


@pytest.fixture(autouse=True)
def cold_cache(tmp_path, monkeypatch):
    """A compiler cache of the test's own, so that a second run in it is the warm one."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "inductor"))
    torch.compiler.reset()


def heads(module, **how):
    for task, head in module.heads.items():
        module.heads[task] = torch.compile(head, **how)


def below(module, **how):
    module.trunk[0] = torch.compile(module.trunk[0], **how)


def above_and_below(module, **how):
    below(module, **how)
    heads(module, **how)


def trunk(module, **how):
    module.trunk = torch.compile(module.trunk, **how)


class FeaturesOfTrunk(OnTensors):
    def shared_layer(self):
        return "trunk"


@pytest.mark.feature(
    "`torch.compile` of heads, of the trunk below the shared layer",
    "supported",
    "`default` and `reduce-overhead`, cold and warm cache",
)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize("compile_part", [heads, below, above_and_below])
def test_exact_where_the_shared_layer_is_outside(tmp_path, compile_part, mode):
    x, module = torch.randn(4, 8, 6), OnTensors()
    eager = train(tmp_path, copy.deepcopy(module), loader(x))
    for _cache in ("cold", "warm"):
        compiled = copy.deepcopy(module)
        compile_part(compiled, mode=mode)
        assert_same_history(train(tmp_path, compiled, loader(x)), eager, rtol=1e-4)
        torch.compiler.reset()


@pytest.mark.feature(
    "`torch.compile` of a region with the shared layer in it",
    "refused",
    "“Keep the shared layer outside the compiled region …, or take norm_of='features'”",
)
@pytest.mark.parametrize("engine", ["auto", "per_task"])
def test_a_compiled_shared_layer_is_refused_with_the_way_out(tmp_path, engine):
    module = OnTensors()
    trunk(module)
    words = r"run only once.*Keep the shared layer outside the compiled region.*norm_of='features'"
    with pytest.raises(CompiledSharedLayerError, match=words):
        train(tmp_path, module, loader(torch.randn(3, 8, 6)), Watch(engine=engine))


@pytest.mark.feature('`norm_of="features"` of a compiled trunk', "supported")
def test_features_of_a_compiled_trunk_are_exact(tmp_path):
    x, module = torch.randn(4, 8, 6), FeaturesOfTrunk()
    eager = train(tmp_path, copy.deepcopy(module), loader(x), Watch(norm_of="features"))
    for _cache in ("cold", "warm"):
        compiled = copy.deepcopy(module)
        trunk(compiled)
        assert_same_history(train(tmp_path, compiled, loader(x), Watch(norm_of="features")), eager, rtol=1e-4)
        torch.compiler.reset()


@pytest.mark.feature(
    "`torch.compile` of the whole module",
    "refused",
    "“compile the trunk below the layer and the heads above it, not the whole module”",
)
@pytest.mark.parametrize("norm_of", ["parameters", "features"])
def test_a_whole_compiled_module_is_refused(tmp_path, norm_of):
    with pytest.raises((CompiledSharedLayerError, UnreachedSharedLayerError), match="compile the trunk below"):
        train(tmp_path, torch.compile(FeaturesOfTrunk()), loader(torch.randn(3, 8, 6)), Watch(norm_of=norm_of))


def test_a_whole_compiled_module_trains_as_before_without_the_callback(tmp_path):
    """The mixin alone does not stand in the compiler's way."""
    from tests.helpers import quiet_trainer

    x, module = torch.randn(4, 8, 6), OnTensors()
    eager, compiled = copy.deepcopy(module), copy.deepcopy(module)
    quiet_trainer(tmp_path).fit(eager, loader(x))
    quiet_trainer(tmp_path).fit(torch.compile(compiled, fullgraph=True, backend="aot_eager"), loader(x))
    for ours, theirs in zip(eager.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
