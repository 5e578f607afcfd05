"""Gradient sign dropout."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import arguments, base, coordinates, names, tasks


class GradDropState(NamedTuple):
    """State of :func:`graddrop`."""

    key: jax.Array  # Data of the key for the signs.


@names.by_name("leak")
def graddrop(
    *,
    leak: names.PerTask = 0.0,
    keep: Callable[[jax.Array], jax.Array] = lambda purity: purity,
    sum_batch: bool = False,
    key: int | jax.Array = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gradient sign dropout (GradDrop): just pick a sign, in each coordinate.

    Keeps in each coordinate the entries of one sign, which is positive with the
    probability :math:`f(P)` of the positive sign purity :math:`P`:

    .. math::

      P = \frac12 \left( 1 + \frac{\sum_i g_i}{\sum_i |g_i|} \right), \quad
      d = \sum_i (\ell_i + (1 - \ell_i) k_i) \, g_i,

    where :math:`k_i` is 1 for entries of the sign picked, and 0 for the others. With
    the identity for :math:`f` the expectation of :math:`d` is
    :math:`\sum_i g_i`.

    The paper does so at the shared features :math:`z`, for all examples :math:`b` of a
    batch alike: purities and signs are those of

    .. math::

      \bar g_i = \sum_b \operatorname{sign}(z_b) \, g_{i b},

    and what is kept of a feature is kept in every example.

    Args:
      leak: :math:`\ell`, the share of a gradient that is always kept, between 0 and 1,
        one for all tasks, shape ``(T,)`` or a dict by name.
      keep: :math:`f`, from purities to probabilities.
      sum_batch: whether to do as the paper: the parameters are features, as in
        :func:`~optax_mtl.value_and_grad_at_features` and
        :func:`~optax_mtl.split_tasks`, with a leading axis of examples.
      key: seed or typed random key.

    Returns:
      A gradient transformation that aggregates stacked updates.

    Raises:
      ValueError: for a ``leak`` outside 0 to 1 or of another length than T; with
        ``sum_batch``, at the update, for features without an axis.
      TypeError: with ``sum_batch``, at an update without the features as parameters.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, -4.0, 3.0], [1.0, -2.0, -1.0]])
      >>> method = optax_mtl.graddrop()
      >>> state = method.init(jnp.zeros(3))
      >>> for _ in range(3):
      ...   update, state = method.update(updates, state)
      ...   print(update)
      [ 2. -6.  3.]
      [ 2. -6.  3.]
      [ 2. -6.  3.]

      At the features of a batch of two, where one task of the two is kept:

      >>> features = jnp.array([[1.0], [-1.0]])  # Sums: 3 - 1 > 0 and -4 + 1 < 0.
      >>> updates = jnp.array([[[3.0], [1.0]], [[-4.0], [-1.0]]])
      >>> method = optax_mtl.graddrop(sum_batch=True)
      >>> update, _ = method.update(updates, method.init(features), features)
      >>> print(update[:, 0])
      [3. 1.]

    References:
      Chen et al, `Just Pick a Sign: Optimizing Deep Multitask Models with Gradient
      Sign Dropout <https://arxiv.org/abs/2010.06808>`_, NeurIPS 2020

    .. note::
      Without ``sum_batch`` there is a coin for each parameter, or for each example and
      feature, which is another method than the paper's. As in the authors' code, a
      feature whose sum is exactly 0, such as one that is 0 in all examples, is kept;
      that code also rescales the result to a norm; here none.
    """
    arguments.check_range("leak", leak, "[0, 1]")
    arguments.check_key(key)
    arguments.check_function("keep", keep)
    arguments.check_choice("sum_batch", sum_batch, (True, False))

    def init_fn(params):
        del params
        return GradDropState(arguments.key_data(key))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        num_tasks = tasks.check_stacked(updates, params)
        if num_tasks is None:
            return updates, state
        leaks = arguments.for_each_task("leak", leak, num_tasks)
        next_key, _ = jax.random.split(arguments.key_of(state.key, key))
        leaves, structure = jax.tree.flatten(updates)
        features = _features(params, leaves) if sum_batch else [None] * len(leaves)
        # Words in the state: those of a new key would be computed in every leaf.
        random = lambda number: lambda like: _uniform(state.key, number, like)
        dropped = [
            _drop_signs(x, z, random(i), leaks, keep)
            for i, (x, z) in enumerate(zip(leaves, features))
        ]
        new_updates = jax.tree.unflatten(structure, dropped)
        new_state = base.keep_if(
            base.all_finite(new_updates),
            GradDropState(arguments.key_data(next_key)),
            state,
        )
        return new_updates, new_state

    return base.from_coordinates(init_fn, update_fn)


def _features(params, leaves):
    """The features that the gradients are taken of."""
    if params is None:
        raise TypeError(
            "graddrop(sum_batch=True) reads the features that the gradients are taken"
            " of: call update(updates, state, features)"
        )
    if any(x.ndim < 2 for x in leaves):
        raise ValueError(
            "graddrop(sum_batch=True) takes the leading axis of each parameter for that"
            f" of the examples, but the parameters have shapes"
            f" {[jnp.shape(x)[1:] for x in leaves]}: it is for features, as in"
            " optax_mtl.value_and_grad_at_features"
        )
    return jax.tree.leaves(params)


def _drop_signs(x, features, random, leaks, keep):
    accurate = jnp.promote_types(x.dtype, jnp.float32)
    g = coordinates.each(lambda g: g.astype(accurate), x)
    signed = g
    if features is not None:
        signs = jnp.sign(features).astype(accurate)
        signed = coordinates.each(lambda g: jnp.sum(signs * g, 0, keepdims=True), g)
    size = coordinates.reduce(jnp.add, coordinates.each(jnp.abs, signed))
    total = coordinates.reduce(jnp.add, signed)
    purity = (1 + total / jnp.where(size == 0, 1, size)) / 2
    positive = keep(purity) > random(purity)
    kept = lambda s: ((s > 0) == positive) | (s == 0)
    leave = lambda leak, s, g: jnp.where(kept(s), g, leak * g)
    left = coordinates.each(leave, leaks.astype(accurate), signed, g)
    out = coordinates.reduce(jnp.add, left)
    # What is not finite is not dropped: the step is to be skipped.
    return jnp.where(jnp.isfinite(size), out, jnp.nan).astype(x.dtype)


def _uniform(words, number, like):
    """Random numbers in [0, 1): hashes of a key, the number of a leaf, and the place.

    In the place of :mod:`jax.random`, whose numbers alone take longer than all the rest
    of the method. The same however the array is laid out.
    """
    place = jnp.zeros_like(like, jnp.uint32)
    for axis, size in enumerate(like.shape):
        along = jax.lax.broadcasted_iota(jnp.uint32, like.shape, axis)
        place = place * np.uint32(size) + along
    # Two rounds of multiply and shift, of the kind that Wellons' hash-prospector
    # searches, with a second key in between; more rounds take long to compile.
    leaf = words[-1] + np.uint32(number * 0x9E3779B9 % 2**32)
    bits = place + words[0]
    bits = (bits ^ (bits >> 16)) * np.uint32(0x21F0AAAD) ^ leaf
    bits = (bits ^ (bits >> 15)) * np.uint32(0xD35A2D97)
    bits = bits ^ (bits >> 15)
    # As many as float32 has digits.
    return (bits >> 8).astype(jnp.int32).astype(like.dtype) / 2**24
