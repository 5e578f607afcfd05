"""A soft gate between tasks, by the energy and the alignment of their gradients."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, coordinates, names, report, tasks


class EnergyGateState(NamedTuple):
    """State of :func:`energy_gate`."""

    average: optax.Updates  # Moving average of the updates.
    counts: optax.Updates  # Energies seen, shape `(num_tasks,)` for each tensor.
    energies: optax.Updates  # Moving averages of the energies, likewise.

    def __repr__(self):
        return report.describe_state(self)


@names.by_name("boost")
def energy_gate(
    num_tasks: int,
    *,
    granularity: str = "element",
    temperature: jax.typing.ArrayLike = 1.0,
    boost: names.PerTask = 1.0,
    magnitude: jax.typing.ArrayLike = 1.0,
    alignment: jax.typing.ArrayLike = 1.0,
    decay: jax.typing.ArrayLike = 0.9,
    energy_decay: jax.typing.ArrayLike = 0.99,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets tasks share the update by the energy of their gradients, softly.

    For each group :math:`k` of parameters, the energy of a gradient is its mean
    square times its alignment with the moving average :math:`u` of the updates:

    .. math::

      E_{ik} = \operatorname{mean}_k(g_i^2)^q
      \left(\frac{1 + \cos_k(g_i, u)}{2}\right)^r, \qquad
      d_k = T \sum_i \operatorname{softmax}_i
      \left(\frac{1}{\tau} \log \frac{b_i E_{ik}}{\bar{E}_i}\right) g_{ik}.

    :math:`\bar{E}_i` is the moving average of the task's energy in the tensor, so
    that a loss is not preferred for being large. The gate of the first of two tasks
    is twice the sigmoid of the logarithm of the ratio of their energies, over
    :math:`\tau`. A high temperature gives the plain sum.

    This is not EAGC, the method of a paper: see :func:`~optax_mtl.eagc`.

    Args:
      num_tasks: number of tasks, T.
      granularity: whether a group is an ``"element"``, a ``"channel"`` (an index of
        the last axis) or a whole ``"tensor"``.
      temperature: :math:`\tau`. Positive.
      boost: :math:`b`, factors for tasks to be favoured, a scalar, shape ``(T,)`` or a
        dict by name. Positive.
      magnitude: exponent :math:`q`. At least 0.
      alignment: exponent :math:`r`. Without an average yet, the alignment is 1/2. At
        least 0.
      decay: of the moving average of the updates. In [0, 1).
      energy_decay: of the moving averages of the energies. In [0, 1).

    Returns:
      A gradient transformation that aggregates stacked updates. A task without a
      gradient in a tensor takes no part there.

    Raises:
      ValueError: for an unknown granularity, or a temperature or boost that is not
        positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[2.0, 1], [1, 1]])
      >>> method = optax_mtl.energy_gate(num_tasks=2)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(jnp.array_str(update, precision=3))
      [3.231 2.   ]

    References:
      A heuristic of this library, after popular descriptions of gradient
      coordination for category discovery.

    .. note::
      The alignment of an element is 0 or 1, at any temperature: where tasks disagree
      in sign, those that oppose the average are shut out. On category discovery
      (``examples/gcd``) this loses to the plain sum; whole tensors at a temperature
      of 4 lose less.
    """
    arguments.check_count("num_tasks", num_tasks)
    arguments.check_choice("granularity", granularity, ("element", "channel", "tensor"))
    arguments.check_range("temperature", temperature, "(0, inf)")
    arguments.check_range("boost", boost, "(0, inf)")
    arguments.check_range("magnitude", magnitude, "[0, inf)")
    arguments.check_range("alignment", alignment, "[0, inf)")
    arguments.check_range("decay", decay, "[0, 1)")
    arguments.check_range("energy_decay", energy_decay, "[0, 1)")

    def init_fn(params):
        return EnergyGateState(
            average=base.zeros_like(params, dtype=float),
            counts=jax.tree.map(lambda _: jnp.zeros(num_tasks, jnp.int32), params),
            energies=jax.tree.map(lambda _: jnp.zeros(num_tasks, float), params),
        )

    def energy(g, u):
        """Energy of each task in each group; axes as those of the gradients."""
        mean = lambda x: jnp.mean(x, _axes_within(x, granularity), keepdims=True)
        g, u = g.astype(u.dtype), u[None]
        square = mean(g**2)
        size = jnp.sqrt(square) * jnp.sqrt(mean(u**2))
        cosine = jnp.where(size > 0, mean(g * u) / jnp.where(size > 0, size, 1), 0)
        opposed = cosine < 8 * jnp.finfo(u.dtype).eps - 1  # Up to rounding errors.
        aligned = jnp.where(opposed, 0, (1 + cosine) / 2)
        return square**magnitude * aligned**alignment

    def measure(g, energy):
        """Mean energy of each task in the tensor, and whether it has a gradient."""
        energy = jnp.broadcast_to(energy, g.shape)
        total, exists = coordinates.sum_and_any(energy, g != 0)
        return total / (g.size // len(g)), exists

    def track(old, new, exists):
        return jnp.where(exists, energy_decay * old + (1 - energy_decay) * new, old)

    def resolve(g, energy, usual, count, exists):
        usual = usual / (1 - energy_decay ** jnp.maximum(count, 1))
        boosts = arguments.for_each_task("boost", boost, num_tasks)
        factor = boosts / jnp.where(usual > 0, usual, 1)
        # Energies may add up to more than each of them is.
        factor = jnp.where(jnp.isfinite(usual), factor, jnp.nan)
        # Energies of zero become the smallest number, and stay equal to each other.
        tiny = jnp.finfo(energy.dtype).tiny

        # The softmax of logarithms is a ratio; of roots, because it spans the range of
        # numbers twice.
        def root(energy, factor, exists):
            return jnp.sqrt(jnp.where(exists, jnp.maximum(factor * energy, tiny), 0))

        factor = jnp.broadcast_to(factor, exists.shape)
        roots = coordinates.each(root, energy, factor, exists)
        inverse = base.reciprocal(coordinates.reduce(jnp.maximum, roots))
        power = 2 / temperature
        shares = coordinates.each(lambda root: (root * inverse) ** power, roots)
        total = coordinates.reduce(jnp.add, coordinates.each(jnp.multiply, shares, g))
        gates = exists.sum() * base.reciprocal(coordinates.reduce(jnp.add, shares))
        return gates * total

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        if tasks.check_stacked(updates, params, num_tasks) is None:
            return updates, state
        now = jax.tree.map(energy, updates, state.average)
        seen = now
        if granularity == "element":  # As large as the gradients.
            each = lambda *trees: jax.tree.map(energy, *trees)
            seen = base.again(each, updates, state.average)
        means, exists = jax.tree.transpose(
            jax.tree.structure(updates),
            jax.tree.structure((0, 0)),
            jax.tree.map(measure, updates, seen),
        )
        counts = jax.tree.map(jnp.add, state.counts, exists)
        energies = jax.tree.map(track, state.energies, means, exists)
        update = jax.tree.map(resolve, updates, now, energies, counts, exists)
        some = jnp.any(tasks.has_gradient(exists))
        step = jnp.where(some, 1 - decay, 0)
        average = optax.incremental_update(update, state.average, step)
        new_state = base.keep_if(
            base.all_finite(update), EnergyGateState(average, counts, energies), state
        )
        return jax.tree.map(lambda d, g: d.astype(g.dtype), update, updates), new_state

    return base.from_coordinates(init_fn, update_fn)


def _axes_within(x, granularity):
    """The axes of stacked gradients along which a group extends."""
    if granularity == "element":
        return ()
    return tuple(range(1, x.ndim - 1 if granularity == "channel" else x.ndim))
