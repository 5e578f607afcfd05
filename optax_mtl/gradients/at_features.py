"""Conflicts resolved at the features of a shared trunk."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, tasks
from optax_mtl.gradients.backward import (
    pull_back_each,
    separate_losses,
    take_aux,
)
from optax_mtl.gradients.resolver import Resolver, resolve, with_optimizer
from optax_mtl.gradients.sharing import merge, split, split_floating


def value_and_grad_at_features(
    trunk_fn: Callable[..., Any],
    heads_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    sum_batch: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> Resolver:
    r"""Makes a function that resolves conflicts at the features of a shared trunk.

    .. math::

      z = f(\theta), \qquad \nabla_\theta = \Big(\frac{\partial z}{\partial \theta}
      \Big)^\top A\big(\nabla_z L_1, \ldots, \nabla_z L_T\big)
      + \sum_i \frac{\partial L_i}{\partial \theta} \Big|_z

    The method :math:`A` resolves the gradients with respect to the features, which
    cost a backward pass through the heads alone; one backward pass through the
    trunk follows. Heads get the gradient of the sum of the losses.

    Args:
      trunk_fn: maps the parameters and further arguments to the features, an array
        or a tree of arrays. Those that are not floating point, such as masks, pass by
        the method to the heads.
      heads_fn: maps the parameters, the features and the same further arguments to
        the losses, as in :func:`value_and_task_grads`.
      method: any method, or a chain that begins with one, at the features.
      has_aux: whether both functions return a pair, with auxiliary data second.
      sum_batch: whether to measure the gradients after summing them over the
        leading axis of the features, the examples. The weights apply to each
        example as before; the method must read nothing but the Gram matrix and the
        losses.
      optimizer: makes updates of all parameters out of the gradient, as in
        :func:`value_and_grad`.

    Returns:
      A function of the parameters, the state and further arguments that returns
      ``(losses, grads, state)``, or ``((losses, aux), grads, state)`` where ``aux``
      is the pair of what the trunk and the heads returned. Its ``init``, of the
      parameters and the same further arguments, makes the first state: from the
      shapes of the features, which the method resolves.

    Raises:
      TypeError: at the call, with ``sum_batch`` for a method that reads gradients,
        for a chain without a method, and for parameters that are not floating point.
      ValueError: at the call, if the losses are neither a vector nor scalars, and
        for a state or a result of other shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> trunk_fn = lambda params, x: x * params["trunk"]
      >>> heads_fn = lambda params, z, x: jnp.mean((z * params["head"] - 1) ** 2, 0)
      >>> fn = optax_mtl.value_and_grad_at_features(
      ...     trunk_fn, heads_fn, optax_mtl.mean()
      ... )
      >>> params = {"trunk": jnp.array(1.0), "head": jnp.array([[1.0, 2.0]])}
      >>> batch = jnp.array([[1.0], [2.0]])
      >>> losses, grads, state = fn(params, fn.init(params, batch), batch)
      >>> print(losses, grads["trunk"], grads["head"][0])
      [0.5 5. ] 8.0 [2. 7.]

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018

    .. note::
      This is exact for the sum, and an upper bound in the paper's sense otherwise:
      conflicts at the features are not conflicts at the parameters.
    """
    arguments.check_choice("has_aux", has_aux, (True, False))
    arguments.check_choice("sum_batch", sum_batch, (True, False))
    method = arguments.as_transformation("method", method)
    init_call = (
        "the init of what value_and_grad_at_features returns:"
        " resolve.init(params, *args), from the features and not from the parameters"
    )

    def init(params, *args, **kwargs):
        value = jax.eval_shape(trunk_fn, params, *args, **kwargs)
        features, _ = take_aux(value, has_aux, "trunk_fn")
        zeros = lambda z: jnp.zeros(z.shape, z.dtype)
        return method.init(jax.tree.map(zeros, _split_features(features)[0]))

    def fn(params, state, *args, **kwargs):
        def features_of(params):
            value = trunk_fn(params, *args, **kwargs)
            features, aux = take_aux(value, has_aux, "trunk_fn")
            features, others = _split_features(features)
            return features, (others, aux)

        split(params, None)  # Validates the parameters.
        features, pull_back_trunk, (others, trunk_aux) = jax.vjp(
            features_of, params, has_aux=True
        )

        def losses_of(params, features):
            value = heads_fn(params, merge(features, others), *args, **kwargs)
            losses, _ = take_aux(value, has_aux, "heads_fn")
            return separate_losses(losses), value

        primals = (params, features)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        updates = pull_back_each(push_forward, primals, losses)[1]
        named, _ = take_aux(value, has_aux, "heads_fn")
        if sum_batch:
            totals = partial(jax.tree.map, lambda g: g.sum(axis=1), updates)
            updates = tasks.GramView(
                len(tasks.stack_losses(losses, None)),
                lambda: tasks.gram(totals()),
                partial(tasks.combine, updates=updates),
            )
        resolved, state = resolve(method, updates, state, features, named, init_call)
        pull_back = jax.linear_transpose(push_forward, *primals)
        ones = jax.tree.map(jnp.ones_like, losses)
        grads = optax.tree.add(pull_back_trunk(resolved)[0], pull_back(ones)[0])
        if has_aux:
            value = (value[0], (trunk_aux, value[1]))
        return value, grads, state

    if optimizer is None:
        return Resolver(init, fn)
    return with_optimizer(Resolver(init, fn), optimizer, has_aux, init_call)


def _split_features(features: Any) -> tuple[Any, Any]:
    """Those with a gradient, and the others, such as masks; None stands for a hole."""
    floating, others = split_floating(features)
    if not jax.tree.leaves(floating):
        raise TypeError(
            "trunk_fn should return floating-point features, but returned shapes"
            f" {jax.tree.map(jnp.shape, features)} of dtypes"
            f" {[str(jnp.result_type(z)) for z in jax.tree.leaves(features)]}"
        )
    return floating, others
