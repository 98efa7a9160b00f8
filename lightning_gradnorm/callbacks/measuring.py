"""How a callback measures: the shared layer, the engine around the backward, the micro-batches, the ranks."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from lightning_gradnorm.balancers.checks import check_choice
from lightning_gradnorm.callbacks.link import NotedLosses
from lightning_gradnorm.callbacks.ranks import RankAgreement
from lightning_gradnorm.gradients import GradientReader, IncompleteBackwardError, JointBackward, PerTaskBackward
from lightning_gradnorm.shared_layer import (
    SharedLayer,
    detect_shared_layer,
    feature_modules,
    resolve_shared_layer,
    shared_features,
)
from lightning_gradnorm.window import MeasurementWindow

Engine = Literal["auto", "joint", "per_task"]
NormOf = Literal["parameters", "features"]
_ENGINES: dict[str, type[GradientReader]] = {"auto": JointBackward, "joint": JointBackward, "per_task": PerTaskBackward}


class Measuring:
    """Reads the tasks' gradients around each backward and adds up what belongs to one optimiser step.

    Args:
        engine: ``"joint"``, ``"per_task"``, or ``"auto"``.
        norm_of: ``"parameters"`` of the shared layer, or its ``"features"``: the layer's output.
        needs: what the balancer needs of a measurement.

    Attributes:
        shared: the shared layer, once it is known.
        engine_used: once a step was measured.
        window: the step's sums so far.
    """

    def __init__(self, engine: Engine, norm_of: NormOf, needs: Sequence[str] = ()) -> None:
        check_choice("engine", engine, get_args(Engine))
        check_choice("norm_of", norm_of, get_args(NormOf))
        self.magnitudes = "gradient_means" in needs
        if self.magnitudes and norm_of == "features":
            raise ValueError(
                "norm_of='features' has norms only, and this method needs the sizes of single entries of the parameters' "
                "gradients. Take norm_of='parameters', or a form of the method that needs norms."
            )
        self._with_kpis = "kpis" in needs
        self.engine, self.norm_of = engine, norm_of
        self.shared: SharedLayer | None = None
        self.engine_used: str | None = None
        self.reader_type = _ENGINES[engine]
        self._reader: GradientReader | None = None
        self.known_names: list[str] = []  # of W in the run that a checkpoint is from
        self._features: list[tuple[Tensor, GradientEdge]] = []
        self._hooks: list[RemovableHandle] = []
        self.restart()

    def restart(self) -> None:
        """A new fit: the layer is looked up again, and the ranks agree again."""
        self.shared = None
        self._agreement = RankAgreement()
        self.let_go()

    def let_go(self) -> None:
        """Drop everything that belongs to a step under way, graphs included."""
        self.window = MeasurementWindow(of_features=self.norm_of == "features", with_kpis=self._with_kpis)
        self._drop_reader()
        self.stop_watching()

    def _drop_reader(self) -> None:
        if self._reader is not None:
            self._reader.discard()
            self._reader = None

    def watch(self, module: Any) -> None:
        """Keep what will be needed of the shared layer's calls in the batch that begins."""
        if self.norm_of == "features":
            for layer in feature_modules(module.shared_layer(), module):
                self._hooks.append(layer.register_forward_hook(self._keep_output))

    def _keep_output(self, layer: nn.Module, inputs: Any, output: Any) -> None:
        features = output[0] if isinstance(output, tuple) else output
        if isinstance(features, Tensor) and features.requires_grad:
            self._features.append((features, get_gradient_edge(features)))  # before anything changes them in place

    def stop_watching(self) -> None:
        """The batch is over."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._features.clear()

    def find_layer(self, module: Any, losses: Mapping[str, Tensor]) -> None:
        """W, as the module gives it or as the graph of its first batch shows it.

        Raises:
            TypeError, ValueError: where there is none that will do; the message says the way out.
        """
        spec = module.shared_layer()
        if self.norm_of == "features":
            self.shared = shared_features(spec, module)
        else:
            self.shared = detect_shared_layer(losses, module) if spec is None else resolve_shared_layer(spec, module)
            self.known_names = list(self.shared.names)

    def before_backward(self, root: Tensor, noted: NotedLosses) -> bool:
        """Get ready for the backward of ``root``.

        Returns:
            Whether there is anything to read: not while the whole layer is frozen.

        Raises:
            UnreachedSharedLayerError: if a task's loss does not reach W.
        """
        assert self.shared is not None, "find_layer comes first"
        tensors: list[Tensor] = [parameter for parameter in self.shared.parameters if parameter.requires_grad]
        edges = None
        if self.norm_of == "features":
            tensors, edges = [tensor for tensor, _ in self._features], [edge for _, edge in self._features]
        if not tensors:
            return False
        self._reader = self.reader_type(root, noted.losses, tensors, edges)
        return True

    def after_backward(self) -> None:
        """Take what the backward brought.

        Raises:
            IncompleteBackwardError: if it could not be read; the step's sums are dropped, and ``engine="auto"`` goes on with
                the other engine.
        """
        reader, self._reader = self._reader, None
        if reader is None:
            return
        try:
            self.window.add_gradients(reader.gradients())
        except IncompleteBackwardError:
            self.let_go()
            if self.engine == "auto":
                self.reader_type = PerTaskBackward
            raise
        self.engine_used = reader.engine

    def finish(self) -> MeasurementWindow:
        """The window of the optimiser step that is over; the next one is empty."""
        window = self.window
        self.let_go()
        return window

    def reduce(self, window: MeasurementWindow, known_tasks: tuple[str, ...], device: Any) -> None:
        """The same measurement on every rank: one collective, which all ranks call whatever they have seen."""
        agreement = self._agreement
        if not agreement.tasks:
            names = self.shared.names if self.shared is not None else ()
            agreement.agree((*known_tasks, *window.tasks), names, window.entries)
        agreement.check(window.tasks)
        if agreement.tasks:
            window.reduce(agreement.all_reduce, agreement.tasks, agreement.entries, device)
