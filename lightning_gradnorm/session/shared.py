"""The shared layer of a run: found, kept, and read around each backward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.autograd_graph import nodes_below
from lightning_gradnorm.balancers import LossBalancer
from lightning_gradnorm.balancers.checks import check_choice
from lightning_gradnorm.reading import Engine, Reading
from lightning_gradnorm.shared_layer import (
    SharedLayer,
    SharedLayerSearch,
    SharedLayerSpec,
    feature_modules,
    resolve_shared_layer,
    shared_features,
)
from lightning_gradnorm.task_gradients import Weigh
from lightning_gradnorm.traces import generator_of, ntk_trace, random_signs

NormOf = Literal["parameters", "features"]


class SharedReading:
    """Finds W, and reads what each backward brings the tasks on it.

    Args:
        engine: ``"joint"``, ``"per_task"``, or ``"auto"``.
        norm_of: ``"parameters"`` of the shared layer, or its ``"features"``: the layer's output.
        balancer: the method, which says what it needs.

    Attributes:
        layer: the shared layer, once it is known.
        is_given: whether the user has named it, or the method takes all.
        engine: reads the tasks' gradients on it.
        known_names: names of W's parameters, also those of the run that a state is from.
    """

    _network: nn.Module | None
    _given: Callable[[], SharedLayerSpec | None]
    _search: SharedLayerSearch | None
    _declared: tuple[str, ...]
    is_given: bool
    _fitting: set[str]  # the tasks that W is known to fit

    def __init__(self, engine: Engine, norm_of: NormOf, balancer: LossBalancer) -> None:
        check_choice("norm_of", norm_of, get_args(NormOf))
        if balancer.acts_in_backward and engine == "per_task":
            raise ValueError(
                "engine='per_task' reads the gradients before the backward, and when='same step' acts inside of it. Leave "
                "engine at 'auto', or take when='next step'."
            )
        if "gradient_means" in balancer.needs and norm_of == "features":
            raise ValueError(
                "norm_of='features' has norms only, and this method needs the sizes of single entries of the parameters' "
                "gradients. Take norm_of='parameters', or a form of the method that needs norms."
            )
        self.engine: Reading = Reading(engine)
        self.norm_of: NormOf = norm_of
        self._takes_all = balancer.of_all_parameters and norm_of == "parameters"
        self.known_names: list[str] = []
        self.layer: SharedLayer | None = None
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {
            "norm_of": self.norm_of,
            "takes_all": self._takes_all,
            "known_names": list(self.known_names),
            "engine": self.engine.engine,
            "engine_used": self.engine.engine_used,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.norm_of, self.known_names, self.layer = state["norm_of"], state["known_names"], None
        self._takes_all = state["takes_all"]
        self.engine = Reading(state["engine"])
        self.engine.engine_used = state["engine_used"]
        self.close()

    def open(
        self,
        network: nn.Module,
        given: Callable[[], SharedLayerSpec | None],
        declared: Sequence[str],
        giver: str = "shared_layer()",
    ) -> None:
        """A new run: the layer is looked for again.

        Args:
            network: the module that W belongs to.
            given: what its user names as W, if anything.
            declared: the tasks that are known before the first batch.
            giver: where that is named, for the messages.
        """
        self.engine.restart()
        self._giver = giver
        self._network, self._given, self._declared = network, given, tuple(declared)
        self.layer, self._search = None, None
        self._fitting = set()

    def close(self) -> None:
        """The run is over: what belongs to it is let go of; ``layer`` stays, for people to look at."""
        self._network, self._search, self._declared, self.is_given = None, None, (), False
        self._given, self._giver = lambda: None, "shared_layer()"
        self._fitting = set()
        self._features: list[tuple[Tensor, GradientEdge]] = []
        self._hooks: list[RemovableHandle] = []

    def drop(self) -> None:
        """Let go of everything that belongs to a backward under way, graphs included."""
        self.engine.discard()
        self.stop_watching()

    # -- the layer's outputs ---------------------------------------------------------------------------------------

    def watch(self) -> None:
        """Keep the layer's outputs in the forward passes to come, where their gradients are what is read."""
        self.stop_watching()
        if self.norm_of == "features" and self._network is not None:
            for layer in feature_modules(self._given(), self._network, self._giver):
                self._hooks.append(layer.register_forward_hook(self._keep_output))

    def _keep_output(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) else output
        if isinstance(features, Tensor) and features.requires_grad:
            self._features.append((features, get_gradient_edge(features)))  # before anything changes them in place

    def stop_watching(self) -> None:
        """The forward passes are over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._features.clear()

    # -- where the tasks' gradients are compared -------------------------------------------------------------------

    def find(self, losses: Mapping[str, Tensor]) -> bool:
        """Whether W is known for these tasks.

        As the user gives it; or all that is trained, for a method that wants it so; or as a state says it was; or as the
        graphs of the first batches show it, and again where a new task does not reach what was found.

        Raises:
            TypeError, ValueError: where there is none that will do; the message says the way out.
        """
        assert self._network is not None, "open comes first"
        if self.layer is None and self._search is None:
            spec = self._given()
            self.is_given = spec is not None or self._takes_all
            if self.norm_of == "features":
                self.layer = shared_features(spec, self._network, self._giver)
            elif spec is not None:
                self.layer = resolve_shared_layer(spec, self._network, self._giver)
            elif self._takes_all:
                whole = resolve_shared_layer(self._network, self._network)
                self.layer = replace(whole, reason="all that is trained, as the method has it; name less by shared_layer")
        if self.is_given:
            return True
        if self.layer is None and self._search is None and self._are_known():
            self.adopt(self.known_names, "as before; name another by shared_layer")
        if self.layer is None or not self._fits(self.layer, losses):
            self.layer = self._searching().look(losses)
            self._fitting = set() if self.layer is None else self._fitting | losses.keys()
        return self.layer is not None

    @property
    def was_looked_for(self) -> bool:
        """Whether a batch of this run was asked where W is."""
        return self._search is not None

    def remember(self) -> None:
        """A step was measured: a run that goes on from here, or from a state, takes the same layer."""
        if self.layer is not None and self.norm_of == "parameters":
            self.known_names = list(self.layer.names)

    def _are_known(self) -> bool:
        assert self._network is not None
        trained = {name for name, parameter in self._network.named_parameters() if parameter.requires_grad}
        return bool(self.known_names) and trained.issuperset(self.known_names)

    def _fits(self, layer: SharedLayer, losses: Mapping[str, Tensor]) -> bool:
        """Whether the tasks that are new reach W; if none of them all does, it is left out of this step and says nothing."""
        new = losses.keys() - self._fitting
        if not new:
            return True
        reach = {task for task, loss in losses.items() if self._searching().fits(layer, {task: loss})}
        if not reach:
            return len(new) < len(losses)
        self._fitting |= reach
        return new <= reach

    def _searching(self) -> SharedLayerSearch:
        assert self._network is not None
        if self._search is None:
            self._search = SharedLayerSearch(self._network, self._declared)
        return self._search

    def adopt(self, names: Sequence[str], reason: str) -> None:
        """Take the parameters of these names for W."""
        assert self._network is not None
        found = resolve_shared_layer(list(names), self._network)
        self.layer = SharedLayer(found.names, found.parameters, reason)

    # -- around the backward ---------------------------------------------------------------------------------------

    def before_backward(
        self,
        root: Tensor,
        losses: Mapping[str, Tensor],
        *,
        keep: bool = True,
        pairs: bool = False,
        weigh: Weigh | None = None,
    ) -> bool:
        """Get ready for the backward of ``root``.

        Args:
            root: scalar that ``backward()`` will be called on.
            losses: the tapped losses that it was built from.
            keep: whether the gradients themselves will be asked for, or their norms alone.
            pairs: whether their inner products will be asked for beside the norms.
            weigh: the weights under which they are put together anew in this backward, if they are to be.

        Returns:
            Whether there is anything to read: not while the whole layer is frozen, or was not called.

        Raises:
            UnreachedSharedLayerError: if a task's loss does not reach W.
            ScatteredTasksError: if they cannot be put together anew.
        """
        tensors, edges = self._wanted()
        if not tensors:
            return False
        self.engine.begin(root, losses, tensors, edges, keep=keep, pairs=pairs, weigh=weigh)
        return True

    def ntk_traces(self, residuals: Mapping[str, Tensor], *seed: int) -> dict[str, Tensor]:
        """Task → the trace of its tangent kernel on W over the number of its points, scalar; before the backward is prepared.

        Args:
            residuals: task name → the squared residuals of its points, with their graph.
            seed: numbers of which the random signs are a function.

        Raises:
            CompiledSharedLayerError, HiddenUseError: if a graph cannot be walked twice.
        """
        if not residuals:
            return {}
        tensors, edges = self._wanted()
        return {
            task: ntk_trace(squares, tensors, random_signs((1, *squares.shape), generator_of(*seed, number)), edges)
            for number, (task, squares) in enumerate(residuals.items())
        }

    def _wanted(self) -> tuple[list[Tensor], list[GradientEdge] | None]:
        """The tensors of W that are trained, and the edges on which their gradients arrive if these are not their own."""
        assert self.layer is not None, "find comes first"
        if self.norm_of == "features":
            return [tensor for tensor, _ in self._features], [edge for _, edge in self._features]
        return [parameter for parameter in self.layer.parameters if parameter.requires_grad], None


def hides_parameters(root: Tensor) -> bool:
    """Whether parts of the graph hide what they use: those that are compiled, or in a reentrant checkpoint."""
    kinds = ("CompiledFunctionBackward", "CheckpointFunctionBackward")
    return any(type(node).__name__ in kinds for node in nodes_below(root.grad_fn))
