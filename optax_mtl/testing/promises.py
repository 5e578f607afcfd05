"""What a method may promise for any gradients, tried in float64.

So that nothing but the method can fail, matrices are random, stationary, degenerate and
badly scaled, and every update is tried without a history and with one.
"""

import functools
from collections.abc import Callable

import jax
import numpy as np

from optax_mtl import arguments
from optax_mtl.testing import contract
from optax_mtl.testing.contract import Make
from optax_mtl.testing.samples import (
    NUM_PARAMS,
    NUM_TASKS,
    compiled_fast,
    matrices,
    stacked,
)

LOSSES = np.linspace(0.5, 2.0, NUM_TASKS)
TOLERANCE = 1e-6


def check_promise(promise: str, make: Make) -> None:
    """Raises if a method does not keep a promise.

    Args:
      promise: a key of ``PROMISES``, as the rows of :data:`optax_mtl.METHODS`
        have them.
      make: returns the method for a number of tasks.

    Raises:
      AssertionError: with the promise, and the numbers.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> from optax_mtl import testing
      >>> first = lambda gram: jnp.zeros(len(gram)).at[0].set(1)
      >>> make = lambda num_tasks: optax_mtl.from_gram(first)
      >>> testing.check_promise("scales", make)
      >>> try:
      ...     testing.check_promise("symmetric", make)
      ... except AssertionError as error:
      ...     print(str(error).split(". ")[0])
      symmetric: the order of the tasks does not matter
    """
    arguments.check_choice("promise", promise, PROMISES)
    arguments.check_function("make", make)
    says = " ".join((PROMISES[promise].__doc__ or "").split())
    try:
        with jax.enable_x64(True):
            PROMISES[promise](make)
    except AssertionError as error:
        raise AssertionError(f"{promise}: {says} {error}") from None


def check_scale(scale: str, make: Make) -> None:
    """Raises if the update of T equal gradients g is not that of a native scale.

    Args:
      scale: ``"sum"`` for T g, or ``"mean"`` for g.
      make: returns the method for a number of tasks.

    Raises:
      AssertionError: with the numbers.
    """
    arguments.check_choice("scale", scale, ("sum", "mean"))
    arguments.check_function("make", make)
    gradient = np.random.default_rng(5).normal(size=(8, 1, NUM_PARAMS))
    equal = np.tile(gradient, (1, NUM_TASKS, 1))
    factor = {"sum": NUM_TASKS, "mean": 1}[scale]
    with jax.enable_x64(True):
        actual = _updates(make, equal, np.ones(NUM_TASKS))
    _check_same(f"The {scale} of equal gradients", actual, factor * gradient, equal)


@functools.cache
def _aggregate(make, num_tasks):
    """The method as a compiled function of a batch of matrices and losses."""
    method = make(num_tasks)

    def two_steps(matrix, losses):
        step = lambda state, _: method.update(matrix, state, losses=losses)[::-1]
        return jax.lax.scan(step, method.init(matrix[0]), length=2)[1]

    return compiled_fast(jax.vmap(two_steps, in_axes=(0, None)))


def _updates(make, batch, losses=LOSSES):
    """The first two updates, shape (8, 2, 6): without a history and with one."""
    return np.asarray(_aggregate(make, len(losses))(np.asarray(batch), losses))


def _size(batch):
    """The natural size of an update: the norm of the largest gradient."""
    return np.linalg.norm(batch, axis=2).max(axis=1)


def _check_same(case, actual, expected, batch):
    error = np.linalg.norm(actual - expected, axis=-1)
    norm = np.linalg.norm(expected, axis=-1)
    relative = error / np.maximum(norm, _size(batch)[:, None])
    _check_at_most(f"{case}: the relative error", relative, TOLERANCE, batch)


def _check_at_most(what, values, bound, batch):
    """Raises for the worst of some values, shape (matrices, steps, ...)."""
    values = np.where(np.isnan(values), np.inf, values)
    if np.all(values <= bound):
        return
    worst = np.unravel_index(np.argmax(values), values.shape)
    raise AssertionError(
        f"{what} is {values[worst]:.2g}, at most {bound:.2g} is allowed, at step"
        f" {worst[1]} with the gradients\n{batch[worst[0]]}"
    )


def symmetric(make):
    """the order of the tasks does not matter."""
    batch = matrices("any")
    expected = _updates(make, batch)
    for seed in range(3):
        order = np.random.default_rng(seed).permutation(NUM_TASKS)
        actual = _updates(make, batch[:, order], LOSSES[order])
        _check_same(f"In the order {order}", actual, expected, batch)


def rotates(make):
    """an orthogonal map of the gradients maps the update."""
    batch = matrices("any")
    rotation, _ = np.linalg.qr(
        np.random.default_rng(1).normal(size=(NUM_PARAMS, NUM_PARAMS))
    )
    expected = _updates(make, batch) @ rotation
    _check_same("Rotated", _updates(make, batch @ rotation), expected, batch)


def scales(make):
    """gradients c times as large have an update c times as large."""
    batch = matrices("any")
    expected = _updates(make, batch)
    for factor in (1e-6, 3.7, 1e6):
        actual = _updates(make, factor * batch) / factor
        _check_same(f"{factor} times as large", actual, expected, batch)
    with jax.enable_x64(False):
        method, step = contract.compiled(make)
        state, updates = method.init(contract.params()), stacked(3)
        flat = lambda x: np.concatenate([np.ravel(x) for x in jax.tree.leaves(x)])
        expected = flat(step(updates, state)[0])
        for factor in (1e-12, 1e12):
            large = jax.tree.map(lambda x, f=factor: np.float32(f) * x, updates)
            np.testing.assert_allclose(
                flat(step(large, state)[0]) / np.float32(factor),
                expected,
                rtol=1e-3,
                atol=1e-4,
                err_msg=f"{factor} times as large, in float32",
            )


def scale_free(make):
    """a loss in another unit, and with it its gradient, leaves the direction."""
    batch = matrices("regular")
    direction = lambda d: d / np.linalg.norm(d, axis=-1, keepdims=True)
    scales = np.exp(np.random.default_rng(2).normal(size=(NUM_TASKS, 1)))
    expected = direction(_updates(make, batch))
    for units in (scales, 1e-6 * scales, 1e6 * scales):
        actual = direction(_updates(make, units * batch, units[:, 0] * LOSSES))
        case = f"In units {units[:, 0]}: the error of the direction"
        _check_at_most(case, np.abs(actual - expected), TOLERANCE, batch)


def linear_in_scales(make):
    """the first update is linear in the scales of the gradients."""
    batch = matrices("any")
    rng = np.random.default_rng(3)
    first, second = rng.uniform(0.1, 1, (2, NUM_TASKS, 1))
    a, b = 0.3, 0.6
    # A history would depend on the scales, too.
    first_updates = lambda batch: _updates(make, batch)[:, :1]
    expected = a * first_updates(first * batch) + b * first_updates(second * batch)
    actual = first_updates((a * first + b * second) * batch)
    _check_same("A combination of two scales", actual, expected, batch)


def never_conflicts(make):
    """no update opposes the gradient of a task."""
    for kind in ("any", "strong", "regular"):
        batch = matrices(kind)
        update = _updates(make, batch)
        # A stationary point leaves nothing to descend: rounding errors are no
        # direction.
        lengths = np.linalg.norm(update, axis=-1)[..., None]
        zero = lengths <= TOLERANCE * _size(batch)[:, None, None]
        norms = np.linalg.norm(batch, axis=2)[:, None] * lengths
        products = np.einsum("ntp,nsp->nst", batch, update)
        cosines = np.where(zero, 0, products / np.where(norms > 0, norms, 1))
        case = "The cosine with the opposite of the gradient of a task"
        _check_at_most(case, -cosines, TOLERANCE, batch)


def stationary(make):
    """where positive weights cancel the gradients, the update is zero."""
    batch = matrices("strong")
    nothing = np.zeros(batch[:, :1].shape)
    _check_same("At a stationary point", _updates(make, batch), nothing, batch)


def agrees(make):
    """the update of equal gradients has their direction."""
    gradient = np.random.default_rng(4).normal(size=(8, 1, NUM_PARAMS))
    equal = np.tile(gradient, (1, NUM_TASKS, 1))
    update = _updates(make, equal, np.ones(NUM_TASKS))
    cosines = np.sum(update * gradient, axis=-1) / (
        np.linalg.norm(update, axis=-1) * np.linalg.norm(gradient, axis=-1)
    )
    case = "Of equal gradients: the cosine's distance to 1"
    _check_at_most(case, np.abs(cosines - 1), TOLERANCE, equal)


def ignores_absent(make):
    """the others get what they would get without a task whose gradient is zero."""
    batch = matrices("any")
    for absent in (0, 2):
        present = np.arange(NUM_TASKS) != absent
        expected = _updates(make, batch[:, present], LOSSES[present])
        losses = np.where(present, LOSSES, 0)
        actual = _updates(make, np.where(present[:, None], batch, 0), losses)
        _check_same(f"Without task {absent}", actual, expected, batch)


PROMISES: dict[str, Callable[[Make], None]] = {
    promise.__name__: promise
    for promise in (
        symmetric,
        rotates,
        scales,
        scale_free,
        linear_in_scales,
        never_conflicts,
        stationary,
        agrees,
        ignores_absent,
    )
}
