"""Three published rows of DB-PINN (Zhou et al., IJCAI 2025): plain, gradient-weighted, their dual balance, and GradNorm.

Gradient weighting and the dual balance are measured as in the source, on all weights and biases, every tenth step (Allen–Cahn:
every hundredth). Trainings of a thousand steps and more are compiled, and need a C++ compiler.

    python -m benchmarks.experiments.db_pinn              # three seeds: five hours of one core, most of them Allen–Cahn's
    python -m benchmarks.experiments.db_pinn --quick
"""

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from _common import figure_style, plt
from torch import Tensor

from benchmarks.experiments.command import Case, Experiment, main
from benchmarks.experiments.curves import COLOURS, add_legend
from benchmarks.experiments.db_pinn_problems import SETUPS, SetUp
from benchmarks.experiments.records import Problem, Record, Records
from benchmarks.suite.members import OF_LOSSES
from lightning_gradnorm import EqualWeights, GradNorm, LearningRateAnnealing, LossBalancer, Measurement
from lightning_gradnorm.balancers.rule import RuleBalancer

ERROR = "relative L2 error"
SEARCH = 25  # evaluations in one line search at most
COMPILED = 1000  # steps from which on compiling pays
LONGEST = max(setup.steps for setup in SETUPS.values())


class DualBalanced(RuleBalancer):
    """λ_i = the average over all updates of S ρ_i / Σ_j ρ_j, the residual's weight being 1 (Zhou et al., algorithm 1).

    S = Σ_j max |∇ L_r| / mean |∇ λ_j L_j| is the sum of the gradient weights of all conditions, and ρ_i = L_i / (the average
    of L_i over all updates) says how hard a condition is to fit.

    Args:
        reference: the residual's task.
        update_every: steps from one update to the next.
    """

    needs = ("gradient_maxima", "gradient_means")
    _remembers = (("updates", 0.0), ("average_losses", 0.0))

    def __init__(self, reference: str, update_every: int) -> None:
        self.reference = reference
        super().__init__(update_every=update_every)

    def _next(self, measurement: Measurement, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert measurement.gradient_maxima is not None and measurement.gradient_means is not None
        weights, count = state["weights"], state["updates"] + 1
        average = state["average_losses"] + (measurement.losses - state["average_losses"]) / count
        difficulty = measurement.losses / average
        residual = measurement.tasks.index(self.reference)
        others = torch.tensor([task != self.reference for task in measurement.tasks])
        shares = torch.where(others, difficulty, 0) / difficulty[others].sum()
        whole = (measurement.gradient_maxima[residual] / (weights * measurement.gradient_means))[others].sum()
        now = weights + (whole * shares - weights) / count
        return {"weights": torch.where(others, now, 1), "updates": count, "average_losses": average}


METHODS: Mapping[str, Callable[[int], LossBalancer]] = {
    "plain": lambda every: EqualWeights(),
    "gradient-weighted": lambda every: LearningRateAnnealing("pde", update_every=every),
    "DB-PINN": lambda every: DualBalanced("pde", every),
    "GradNorm": lambda every: GradNorm(residuals=["pde"]),
}


class Training:
    """One set-up by one method.

    Args:
        setup: with its points and network.
        balancer: the method.
        merged: whether conditions that the set-up names are one task.
        compiled: whether the losses are, which takes half a minute, and half of a step's time from then on.
    """

    def __init__(self, setup: SetUp, balancer: LossBalancer, *, merged: bool, compiled: bool = False) -> None:
        self.setup, self.balancer = setup, balancer
        self.losses: dict[str, Callable[..., Tensor]] = {task: getattr(setup, task) for task in setup.tasks}
        if compiled:
            self.losses = {task: torch.compile(loss, dynamic=False, fullgraph=True) for task, loss in self.losses.items()}
        self.tasks = tuple(dict.fromkeys("boundary" if merged and task in setup.merged else task for task in setup.tasks))
        of_network = list(setup.network.parameters())
        self.parameters = [*of_network, *(p for name, p in setup.named_parameters() if not name.startswith("network."))]
        self.compared = sum(parameter.numel() for parameter in of_network)
        *_, hidden, _ = setup.network.layers  # its place among all parameters, for GradNorm's W
        start = sum(p.numel() for layer in setup.network.layers[:-2] for p in layer.parameters())
        self.last_hidden = slice(start, start + hidden.weight.numel())
        self.flat = self.parameters[0].new_zeros(sum(parameter.numel() for parameter in self.parameters), requires_grad=False)
        for parameter, part in zip(self.parameters, self.flat.split([p.numel() for p in self.parameters]), strict=True):
            parameter.grad = part.view_as(parameter)

    def differentiate(self) -> tuple[Tensor, Tensor]:
        """Each task's loss ``[T]`` and gradient ``[T, parameters]``; the conditions share no point, so this is no dearer."""
        losses = torch.zeros(len(self.tasks), dtype=torch.float64)
        gradients = self.flat.new_zeros(len(self.tasks), len(self.flat))
        for task, loss_of in self.losses.items():
            place = self.tasks.index(task if task in self.tasks else "boundary")
            loss = loss_of(*self.setup.points[task])
            parts = torch.autograd.grad(loss, self.parameters, materialize_grads=True)
            losses[place] += loss.detach()
            gradients[place] += torch.cat([part.flatten() for part in parts])
        return losses, gradients

    def evaluate(self) -> tuple[Tensor, Tensor, Tensor]:
        """The same, and the total loss, whose gradient is now the parameters'."""
        losses, gradients = self.differentiate()
        weights = self.balancer.weights_at(dict(zip(self.tasks, losses.unbind(), strict=True)))
        torch.mv(gradients.T, weights.to(gradients), out=self.flat)
        return losses, gradients, weights @ losses

    def measure(self, losses: Tensor, gradients: Tensor) -> Measurement:
        """Norms on the last hidden layer's weight, the published methods' statistics on the whole network."""
        of = {"gradient_norms": gradients[:, self.last_hidden]}
        found = {name: function(of.get(name, gradients[:, : self.compared])).double() for name, function in OF_LOSSES.items()}
        return Measurement(self.tasks, losses, **found)

    def step(self, adam: torch.optim.Optimizer) -> None:
        """One of Adam, then the weights for the next."""
        losses, gradients, _ = self.evaluate()
        adam.step()
        self.balancer.update(self.measure(losses, gradients) if self.balancer.due else None)

    def refine(self, iterations: int, evaluations: int) -> int:
        """L-BFGS under the weights as they are, until the budget is spent or a search finds nothing better.

        One iteration at a time: a search that rounding defeats would else take all evaluations that are left.

        Args:
            iterations, evaluations: at most.

        Returns:
            How many evaluations it took.
        """
        settings = {"tolerance_grad": 1e-23, "tolerance_change": 1e-23, "history_size": 100}
        lbfgs = torch.optim.LBFGS(
            self.setup.parameters(), lr=0.1, max_iter=1, max_eval=SEARCH + 1, line_search_fn="strong_wolfe", **settings
        )
        seen: dict[bytes, tuple[Tensor, Tensor]] = {}  # each iteration asks again for the point at which the last one ended
        spent = 0

        def closure() -> Tensor:
            nonlocal spent
            here = self.where()
            if here not in seen:
                spent += 1
                total = self.evaluate()[2]
                seen[here] = total, self.flat.clone()
            total, gradient = seen[here]
            self.flat.copy_(gradient)
            return total

        for _ in range(iterations):
            before = self.where()
            lbfgs.step(closure)
            after = self.where()
            if after == before or spent >= evaluations:
                break
            seen = {after: seen[after]} if after in seen else {}
        return spent

    def where(self) -> bytes:
        """All parameters."""
        return torch.cat([parameter.detach().flatten() for parameter in self.parameters]).numpy().tobytes()


def fit(case: Case) -> Record:
    """One training; all methods of a seed have its points and start from its network."""
    setup = SETUPS[case.problem](case.seed)
    balancer = METHODS[case.method](setup.update_every)
    how = {"merged": case.method == "gradient-weighted", "compiled": case.steps >= COMPILED}
    training = Training(setup, balancer, **how)
    curves: dict[str, list[float]] = {}
    times: list[float] = []

    @torch.no_grad()
    def note(step: int) -> None:
        found = {"step": float(step), "error": setup.error()} | {f"weight {t}": w for t, w in balancer.weights.items()}
        for name, value in found.items():
            curves.setdefault(name, []).append(value)

    adam = torch.optim.Adam(setup.parameters(), lr=1e-3, betas=setup.betas, fused=True)
    for step in range(1, case.steps + 1):
        start = time.perf_counter()
        training.step(adam)
        times.append(time.perf_counter() - start)
        case.progress.on_train_batch_end()
        if step % case.every == 0:
            note(step)
    if setup.evaluations:
        budget = round(setup.evaluations * case.steps)
        spent = training.refine(case.steps, budget)
        if spent < budget:
            note(case.steps + spent)
            spent += Training(setup.double(), balancer, **how).refine(case.steps, budget - spent)
        note(case.steps + spent)
    measures = {ERROR: curves["error"][-1]} | setup.more(case.data)
    return Record(
        case.problem, case.method, case.seed, case.steps, measures, statistics.median(times), balancer.weights, {}, curves
    )


def draw(records: Records, path: Path) -> None:
    """A panel per problem: each seed's error over the steps; what L-BFGS comes to is joined to Adam's last."""
    rows = {name: found for name in SETUPS if (found := records.of(name, METHODS))}
    if not rows:
        return
    with figure_style():
        figure, panels = plt.subplots(1, len(rows), figsize=(4.2 * len(rows), 3.2), squeeze=False)
        for axes, (name, found) in zip(panels[0], rows.items(), strict=True):
            for method, fits in found.items():
                for place, fit in enumerate(fits):
                    label = None if place else method
                    axes.plot(fit.curves["step"], fit.curves["error"], color=COLOURS[method], linewidth=1, label=label)
            axes.set(title=f"{name}: {ERROR} ↓", xlabel="steps and evaluations", yscale="log")
            add_legend(axes)
        figure.savefig(path)
        plt.close(figure)


EXPERIMENT = Experiment(
    name="db_pinn",
    about=__doc__ or "",
    problems={name: Problem(tuple(METHODS), {ERROR: "lower"}) for name in SETUPS},
    fit=fit,
    steps=LONGEST,
    quick_steps=16,
    seeds=3,
    draw=draw,
    lengths={name: setup.steps / LONGEST for name, setup in SETUPS.items()},
)

if __name__ == "__main__":
    main(EXPERIMENT)
