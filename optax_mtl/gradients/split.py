"""Conflicts resolved inside the model, where its heads split.

For whoever has a training loop that is not to change: one line in the model. It costs
what the plain sum costs, and T gradients of the features. It resolves at the features,
not at the parameters, keeps no state, knows no losses, and is differentiated backwards
alone, as is every ``jax.custom_vjp``.
"""

from collections.abc import Collection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

from optax_mtl import arguments, guards, wrappers
from optax_mtl.gradients.sharing import merge, split_floating


def split_tasks(
    z: Any,
    num_tasks: int | Collection[str],
    method: optax.GradientTransformation,
    *,
    axis_name: str | tuple[str, ...] | None = None,
) -> Any:
    r"""Hands the same features to every task, and resolves their gradients.

    .. math::

      z_1 = \ldots = z_T = z, \qquad
      \bar z = A(\bar z_1, \ldots, \bar z_T)

    where :math:`\bar z_i` is the gradient that comes back from the head of task
    :math:`i`; in a plain model, :math:`\bar z = \sum_i \bar z_i`. The loss stays a
    sum, and the training step, the optimizer and the trainer stay what they are:
    heads get the gradient of the sum, the trunk that of the method :math:`A`. As in
    :func:`value_and_grad_at_features`, conflicts are those at the features.

    Args:
      z: features, an array or a tree of arrays. What is not floating point, such as
        a mask, is handed to all tasks as it is.
      num_tasks: number of tasks, T, or their names.
      method: any method without a running state that reads no losses, or a chain
        that begins with one. A random one needs another key in each step, one that
        the step receives: ``pcgrad(key=key)``.
      axis_name: axis of a mesh, or axes, over which :func:`jax.shard_map` or
        ``jax.pmap`` splits the examples: the Gram matrix is then that of the whole
        batch, by one all-reduce of ``T x T`` numbers. Sharded ``jax.jit`` needs none.

    Returns:
      T times the same features, as a tuple; with names, as a dict by name. No copies.

    Raises:
      TypeError: for a method that has a running state or reads losses; with
        ``axis_name``, for one that reads the gradients themselves.
      ValueError: for names that repeat, for features without a floating-point
        array, and for a chain without a method.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> import optax_mtl
      >>> def loss_fn(params, x):
      ...   z = x * params["trunk"]
      ...   z = optax_mtl.split_tasks(z, ["a", "b"], optax_mtl.mgda())
      ...   return jnp.mean((z["a"] - 1) ** 2) + jnp.mean((z["b"] * params["b"]) ** 2)
      >>> params = {"trunk": jnp.array(1.0), "b": jnp.array(2.0)}
      >>> grads = jax.grad(loss_fn)(params, jnp.array([0.5, 1.0]))
      >>> print(f"{grads['trunk']:.3f} {grads['b']:.3f}")
      0.045 2.500

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018

    .. note::
      A task whose head is not used, or whose loss is masked, sends back zeros and is
      absent. Each call resolves on its own: under :func:`jax.vmap` that is once for
      each example, in a scan over layers once for each layer.
    """
    names = None
    if isinstance(num_tasks, (int, np.integer)):
        arguments.check_count("num_tasks", num_tasks)
        count = int(num_tasks)
    else:
        names = _check_names(num_tasks)
        count = len(names)
    features, others = split_floating(z)
    features = jax.tree.map(jnp.asarray, features)
    if not jax.tree.leaves(features):
        raise ValueError(
            "split_tasks needs features with a floating-point array, through which"
            f" gradients come back, but got {jax.tree.map(jax.typeof, z)}"
        )
    copies = _same_for_all(features, count, names, method, axis_name)
    each = tuple(merge(copy, others) for copy in copies)
    return each if names is None else dict(zip(names, each))


def _same_for_all(features, count, names, method, axis_name):
    """The features once for each task; what comes back is resolved."""
    resolve = _traced(features, count, names, method, axis_name)

    # What the method closes over, such as a key, is an argument: the backward pass may
    # belong to another trace, as in a scan.
    @jax.custom_vjp
    def same(features, closed_over):
        del closed_over
        return (features,) * count

    def forward(features, closed_over):
        return same(features, closed_over), closed_over

    def pull_back(closed_over, cotangents):
        run = jaxpr_as_fun(ClosedJaxpr(resolve.jaxpr, closed_over))
        resolved = run(*jax.tree.leaves(cotangents))
        return jax.tree.unflatten(jax.tree.structure(features), resolved), None

    same.defvjp(forward, pull_back)
    return same(features, resolve.consts)


def _traced(features, count, names, method, axis_name):
    """From the gradients of all copies of the features to one, as a jaxpr."""
    with_losses: Any = arguments.as_transformation("method", method)
    if axis_name is not None:
        with_losses = wrappers.with_sharded_parameters(with_losses, axis_name)
    state = method.init(features)
    _check_state(state)
    chain = guards.checked(with_losses)

    def trace(losses):
        def resolve(*copies):
            updates = jax.tree.map(lambda *rows: jnp.stack(rows), *copies)
            return chain.update(updates, state, features, losses=losses)[0]

        try:
            return jax.make_jaxpr(resolve)(*[features] * count)
        except TypeError as error:
            if axis_name is not None and not isinstance(error, _LossesAreRead):
                error.add_note(
                    "Without axis_name, split_tasks resolves the features of each"
                    " device on their own, also by a method that reads gradients."
                )
            raise

    unknown = _Unknown()
    try:
        return trace(dict.fromkeys(names, unknown) if names else unknown)
    except _LossesAreRead as error:
        reads_losses = error
    try:
        return trace(None)  # For whoever looks at losses only if there are any.
    except TypeError:
        raise TypeError(*reads_losses.args) from None


class _LossesAreRead(TypeError):
    """A method reads losses where none are known."""


class _Unknown:
    """A loss that is not known yet."""

    shape, ndim = (), 0

    def __jax_array__(self):
        raise _LossesAreRead(
            "split_tasks stands inside the model, where the losses of the tasks are"
            " not known yet, but this method reads them: take"
            " optax_mtl.value_and_grad_at_features, which hands them on"
        )


def _check_state(state):
    """Refuses what a method carries from step to step, random keys excepted."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    is_key = lambda x: x.dtype == jnp.uint32  # The data of one.
    with_key = {path[:-1] for path, x in leaves if is_key(x)}
    for path, x in leaves:
        # Beside a key, an integer counts what has been drawn.
        counts = jnp.issubdtype(x.dtype, jnp.integer) and path[:-1] in with_key
        if not is_key(x) and not counts:
            raise TypeError(
                "split_tasks stands inside the model and keeps no state, but this"
                f" method has a running one, state{jax.tree_util.keystr(path)} of shape"
                f" {x.shape}: take optax_mtl.value_and_grad_at_features, which hands it"
                " from step to step"
            )


def _check_names(names):
    """The names of the tasks, sorted as those of a dict of losses."""
    is_sequence = isinstance(names, Collection) and not isinstance(names, str)
    if not is_sequence or not names or not all(isinstance(x, str) for x in names):
        raise TypeError(
            f"num_tasks is {names!r}; it should be the number of tasks, or a sequence"
            " of their names"
        )
    repeated = [name for name in set(names) if list(names).count(name) > 1]
    if repeated:
        raise ValueError(
            f"num_tasks names {', '.join(map(repr, sorted(repeated)))} more than once;"
            " give each task a name of its own"
        )
    return sorted(names)
