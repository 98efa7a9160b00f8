"""GradNorm's equations (Chen, Badrinarayanan, Lee, Rabinovich, ICML 2018, arXiv 1711.02257).

Symbols of the paper, and names here: L̃_i ``loss_ratio``; r_i ``relative_inverse_training_rate``; G_i ``gradient_norm`` of
the weighted loss, w_i n_i; Ḡ r_i^α ``target_norm``; L_grad ``gradnorm_loss``. All vectors have shape ``[T]``; where ``active``
is given, boolean, shape ``[T]``, the tasks that it leaves out take no part in any mean, and their entries mean nothing. Vectors
are tensors or NumPy's arrays, all of one call alike, and so is what comes of them.
"""

from lightning_gradnorm.balancers.arrays import Vector, exp, log, sign, where


def where_active(values: Vector, active: Vector | None) -> Vector:
    """The values, 0 for tasks that take no part."""
    return values if active is None else where(active, values, 0.0)


def sum_among(values: Vector, active: Vector | None) -> Vector:
    """Σ over the tasks that take part, scalar."""
    return where_active(values, active).sum()


def loss_ratios(losses: Vector, initial_losses: Vector) -> Vector:
    """L̃_i = L_i(t) / L_i(0): how much of the loss is left, the *inverse* training rate (section 3.1)."""
    return losses / initial_losses


def mean_among(values: Vector, active: Vector | None = None) -> Vector:
    """Mean over the tasks that take part, scalar."""
    return values.mean() if active is None else sum_among(values, active) / active.sum()


def relative_inverse_training_rates(ratios: Vector, active: Vector | None = None) -> Vector:
    """r_i = L̃_i / mean_j L̃_j: above 1 for a task that trains slowly (section 3.1)."""
    return ratios / mean_among(ratios, active)


def target_norms(
    gradient_norms: Vector,
    rates: Vector,
    alpha: float,
    *,
    priorities: Vector | None = None,
    feasible: bool = True,
    active: Vector | None = None,
) -> Vector:
    """Ḡ r_i^α (equation 1): what the weighted gradient norms should be; a constant for L_grad.

    The norms average to Ḡ and the printed targets, in general, do not, so they cannot be met unless α is 0 or 1 or all
    rates are equal. ``feasible`` divides them by mean_j r_j^α, after which they can.

    Args:
        gradient_norms: G_i = w_i n_i, shape ``[T]``.
        rates: r_i, shape ``[T]``.
        alpha: strength of the pull towards equal training rates; at 0 all norms are pulled together.
        priorities: relative importance of the tasks, a factor of the targets; not in the paper.
        feasible: a deviation from the printed equation; ``False`` for the printed one.
        active: which tasks take part; ``None`` for all.
    """
    shares = rates**alpha
    if priorities is not None:
        shares = shares * (priorities / mean_among(priorities, active))
    return mean_among(gradient_norms, active) * (shares / mean_among(shares, active) if feasible else shares)


def gradnorm_loss(gradient_norms: Vector, targets: Vector) -> Vector:
    """L_grad = Σ_i |G_i − target_i| (equation 2), scalar."""
    return abs(gradient_norms - targets).sum()


def gradnorm_gradient(gradient_norms: Vector, targets: Vector, unweighted_norms: Vector) -> Vector:
    """∂L_grad/∂w_i = sign(G_i − target_i) n_i, with the targets constant (Algorithm 1); no second-order graph is needed.

    With G_i in the place of n_i it is ∂L_grad/∂log w_i.
    """
    return sign(gradient_norms - targets) * unweighted_norms


def balanced_weights(unweighted_norms: Vector, rates: Vector, alpha: float, *, priorities: Vector | None = None) -> Vector:
    """w_i ∝ r_i^α / n_i: where L_grad with the feasible target is 0; up to their common factor."""
    shares = rates**alpha if priorities is None else rates**alpha * priorities
    return shares / unweighted_norms


def weights_at_rest(norms: Vector, shares: Vector) -> Vector:
    """ŵ_i = (Σ n / Σ s) s_i / n_i: where L_grad with the feasible target is 0 and the gradient has the plain sum's size.

    That is Σ ŵ_i n_i = Σ n_i: the weights fix the ratios of the tasks' gradients, and leave what an adaptive optimiser of the
    network has learnt of their size.

    Args:
        norms: n_i, of the unweighted tasks, shape ``[T]``; 0 where it is not known.
        shares: s_i = L̃_i^α times the task's priority, shape ``[T]``; 0 where it is not known, and ŵ_i is then NaN.
    """
    return norms.sum() / shares.sum() * shares / norms


RAISED = 5.0  # of the conditions beside the residual, where their gradients are equal


def weights_half_way(norms: Vector, shares: Vector, residuals: Vector) -> Vector:
    """1 for residuals of equations, ŵ_i = 5 √((n_r / s_r) / (n_i / s_i)) for conditions: half of the way, and raised.

    Half-way, in logarithms, between the plain sum and equal gradients is where learning-rate annealing rests too (Wang, Teng,
    Perdikaris 2021): to even gradients out wholly is right where the residual's exceeds the conditions' by orders of magnitude,
    and starves the conditions where it does not. A network that meets the residual and not the conditions has learnt another
    solution of the equation, so these are raised besides.

    Args:
        norms: n_i, of the unweighted tasks, shape ``[T]``; 0 where it is not known.
        shares: s_i, as in ``weights_at_rest``.
        residuals: which tasks are residuals, boolean, shape ``[T]``; n_r and s_r are their geometric means.
    """
    sizes = norms / shares
    logs = log(sizes)
    reference = exp(mean_among(logs, residuals & (logs == logs)))  # of those that are known
    return where(residuals, sizes / sizes, RAISED * (reference / sizes) ** 0.5)
