"""Ways to get the gradients of several tasks, and their resolution, in one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import tasks

# More tasks than these are batched or run in a loop, for the sake of compile time.
_MAX_WRITTEN_OUT, _MAX_WRITTEN_OUT_HEADS = 8, 64

Mask = Any  # Tree of bools with the structure of the parameters, or a prefix of it.


def value_and_task_grads(
    losses_fn: Callable[..., Any],
    has_aux: bool = False,
    *,
    shared: Mask | Callable[[optax.Params], Mask] | None = None,
    sequential: bool = False,
) -> Callable[..., tuple[Any, optax.Updates]]:
    r"""Makes a function that returns the losses and the gradient of each task.

    .. math::

      g_i = \nabla_\theta L_i(\theta), \quad i = 1, \ldots, T

    One forward pass serves all tasks; each adds a backward pass.

    Args:
      losses_fn: maps the parameters and further arguments to the losses: a vector
        of shape ``(T,)`` or a dict of named scalars (tasks in the order of the
        sorted names).
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      shared: which parameters all tasks share, a mask as in :func:`optax.masked`.
        The other parameters (heads) get the ordinary gradient of the sum of the
        losses, not stacked, so that they cost nothing more. ``None``: all.
      sequential: whether to run the backward passes one after the other, with
        memory for one at a time, instead of batched.

    Returns:
      A function of the parameters and further arguments that returns
      ``(losses, updates)``, or ``((losses, aux), updates)``; every leaf of the
      updates has one leading task axis, those of heads excepted.

    Raises:
      TypeError: at the call, for parameters that are not floating point.
      ValueError: at the call, if the losses are neither a vector nor scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda x: {"a": (x**2).sum(), "b": x.sum()}
      >>> losses, updates = optax_mtl.value_and_task_grads(losses_fn)(jnp.ones(2))
      >>> print(updates)
      [[2. 2.]
       [1. 1.]]
    """

    def fn(params, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(losses_fn, has_aux, args, kwargs)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        pull_back = jax.linear_transpose(push_forward, *primals)
        if sequential:
            updates = jax.lax.map(
                lambda cotangent: pull_back(cotangent)[0], _basis(losses)
            )
        else:
            updates = _pull_back_each(push_forward, primals, losses)[0]
        ones = jax.tree.map(jnp.ones_like, losses)
        return value, merge(updates, pull_back(ones)[1])

    return fn


def value_and_grad(
    losses_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    mode: str = "gram",
    shared: Mask | Callable[[optax.Params], Mask] | None = None,
) -> Callable[..., tuple[Any, optax.Updates, optax.OptState]]:
    r"""Makes a function that returns the losses and the resolved gradient.

    .. math::

      G e_i = J (J^\top e_i), \qquad d = J^\top w(G),

    where :math:`J` is the Jacobian of the losses: for each task, one pull-back and
    one push-forward of its result give a column of the Gram matrix; one pull-back
    of the weights gives the update. No more than one gradient is held at a time,
    so that memory does not grow with T. A method that reads the losses alone takes
    one backward pass in all.

    Args:
      losses_fn: as in :func:`value_and_task_grads`.
      method: any method whose weights depend on the Gram matrix and the losses.
        The rest of the chain is applied to the gradient that comes back.
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      mode: how to get there; the result is the same.

        - ``"gram"``: as above.
        - ``"leafwise"``: the Gram matrix from the gradients of all tasks, of which
          the compiler can free one leaf after the other; about as fast as
          ``"stacked"``, and of the three the first to try up to some eight tasks.
        - ``"stacked"``: by :func:`value_and_task_grads`, for any method.

        The latter two also serve models with a ``jax.custom_vjp``, through which
        nothing can be pushed forward.
      shared: which parameters the method resolves, as in
        :func:`value_and_task_grads`; the others get the gradient of the sum.

    Returns:
      A function of the parameters, the state of the method
      (``method.init(params)``) and further arguments that returns
      ``(losses, grads, state)``, or ``((losses, aux), grads, state)``.

    Raises:
      TypeError: at the call, for a method that reads the gradients themselves
        and for parameters that are not floating point.
      ValueError: for an unknown mode; at the call, if the losses are neither a
        vector nor scalars, or not as many as the method was made for.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda x: {"a": ((x - 1) ** 2).sum(), "b": (x**2).sum()}
      >>> method = optax_mtl.cagrad()
      >>> fn = optax_mtl.value_and_grad(losses_fn, method)
      >>> params = jnp.array([0.0, 1.0])
      >>> losses, grads, state = fn(params, method.init(params))
      >>> print(jnp.array_str(grads, precision=3))
      [-1.207  1.207]

    .. note::
      The entries of the Gram matrix have the precision of the model's own forward
      pass: compute losses in float32, and mind ``jax_default_matmul_precision``.
      Under :func:`jax.shard_map`, average the losses over the devices inside
      ``losses_fn``. On a CPU, XLA runs the backward pass of a convolution much
      slower inside a loop, which ``"gram"`` is: prefer ``"leafwise"`` there. With
      ``jax.checkpoint(losses_fn)``, ``"gram"`` takes little more memory than the
      plain sum, for up to one and a half times its time.
    """
    if mode not in ("gram", "leafwise", "stacked"):
        raise ValueError(
            f"mode should be 'gram', 'leafwise' or 'stacked', not {mode!r}"
        )
    method = optax.with_extra_args_support(method)

    def from_gram(params, state, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(losses_fn, has_aux, args, kwargs)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        pull_back = jax.linear_transpose(push_forward, *primals)
        vector = tasks.stack_losses(losses, None)

        def compute_gram():
            if mode == "leafwise":
                return tasks.gram(_pull_back_each(push_forward, primals, losses)[0])
            # Linearized again to leave out the heads, not to multiply them by zero.
            zeros = optax.tree.zeros_like(primals)
            try:
                _, push = jax.linearize(lambda x: push_forward(x, zeros[1]), zeros[0])
            except (NotImplementedError, TypeError) as error:
                raise TypeError(
                    "gradients cannot be pushed forward through this model, which"
                    " probably has a jax.custom_vjp; use mode='leafwise'"
                ) from error
            push_vector = lambda grads: tasks.stack_losses(push(grads), None)

            def column(cotangent):
                # A branch, always taken, since XLA finishes what precedes a branch:
                # in one piece, all layers would be pulled and pushed at once.
                return jax.lax.cond(
                    tasks.stack_losses(cotangent, None).sum() > 0,
                    push_vector,
                    lambda _: jnp.zeros_like(vector),
                    pull_back(cotangent)[0],
                )

            # A loop, since written out XLA would hold the gradients of all tasks.
            gram = jax.lax.map(column, _basis(losses))
            return (gram + gram.T) / 2

        view = tasks.GramView(len(vector), compute_gram)
        weights, state = method.update(view, state, params, losses=vector)
        if getattr(weights, "shape", None) != vector.shape:
            raise TypeError(
                f"expected the weights of {len(vector)} tasks, but the method returned"
                f" {weights}: give a method of optax_mtl, and apply the rest of the"
                " chain to the gradient that value_and_grad returns"
            )
        weights = weights.astype(vector.dtype)
        if isinstance(losses, list):
            weights = list(weights)
        ones = jax.tree.map(jnp.ones_like, losses)
        return value, merge(pull_back(weights)[0], pull_back(ones)[1]), state

    def from_stacked(params, state, *args, **kwargs):
        task_grads = value_and_task_grads(losses_fn, has_aux, shared=shared)
        value, updates = task_grads(params, *args, **kwargs)
        losses = value[0] if has_aux else value
        mask = mask_of(params, shared)
        stacked, heads = split(updates, mask)
        grads, state = method.update(
            stacked, state, split(params, mask)[0], losses=losses
        )
        return value, merge(grads, heads), state

    return from_stacked if mode == "stacked" else from_gram


def value_and_grad_at_features(
    trunk_fn: Callable[..., Any],
    heads_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    sum_batch: bool = False,
) -> Callable[..., tuple[Any, optax.Updates, optax.OptState]]:
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
        or a tree of arrays.
      heads_fn: maps the parameters, the features and the same further arguments to
        the losses, as in :func:`value_and_task_grads`.
      method: any method.
      has_aux: whether both functions return a pair, with auxiliary data second.
      sum_batch: whether to measure the gradients after summing them over the
        leading axis of the features, the examples. The weights apply to each
        example as before; the method must read nothing but the Gram matrix and the
        losses.

    Returns:
      A function of the parameters, the state of the method and further arguments
      that returns ``(losses, grads, state)``, or ``((losses, aux), grads, state)``
      where ``aux`` is the pair of what the trunk and the heads returned. A method
      whose state has the size of what it resolves is initialised by the features.

    Raises:
      TypeError: at the call, with ``sum_batch`` for a method that reads gradients
        and for parameters that are not floating point.
      ValueError: at the call, if the losses are neither a vector nor scalars.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> trunk_fn = lambda params, x: x * params["trunk"]
      >>> heads_fn = lambda params, z, x: jnp.mean((z * params["head"] - 1) ** 2, 0)
      >>> fn = optax_mtl.value_and_grad_at_features(
      ...     trunk_fn, heads_fn, optax_mtl.mean()
      ... )
      >>> params = {"trunk": jnp.array(1.0), "head": jnp.array([[1.0, 2.0]])}
      >>> losses, grads, state = fn(params, (), jnp.array([[1.0], [2.0]]))
      >>> print(losses, grads["trunk"], grads["head"][0])
      [0.5 5. ] 8.0 [2. 7.]

    References:
      Sener and Koltun, `Multi-Task Learning as Multi-Objective Optimization
      <https://arxiv.org/abs/1810.04650>`_, NeurIPS 2018

    .. note::
      This is exact for the sum, and an upper bound in the paper's sense otherwise:
      conflicts at the features are not conflicts at the parameters.
    """
    method = optax.with_extra_args_support(method)

    def fn(params, state, *args, **kwargs):
        def features_of(params):
            value = trunk_fn(params, *args, **kwargs)
            return value if has_aux else (value, None)

        split(params, None)  # Validates the parameters.
        features, pull_back_trunk, trunk_aux = jax.vjp(
            features_of, params, has_aux=True
        )

        def losses_of(params, features):
            value = heads_fn(params, features, *args, **kwargs)
            losses = value[0] if has_aux else value
            return separate_losses(losses, _MAX_WRITTEN_OUT_HEADS), value

        primals = (params, features)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        updates = _pull_back_each(push_forward, primals, losses)[1]
        vector = tasks.stack_losses(losses, None)
        if sum_batch:
            totals = lambda: jax.tree.map(lambda g: g.sum(axis=1), updates)
            view = tasks.GramView(len(vector), lambda: tasks.gram(totals()))
            weights, state = method.update(view, state, features, losses=vector)
            resolved = tasks.combine(weights, updates)
        else:
            resolved, state = method.update(updates, state, features, losses=vector)
        pull_back = jax.linear_transpose(push_forward, *primals)
        ones = jax.tree.map(jnp.ones_like, losses)
        grads = optax.tree.add(pull_back_trunk(resolved)[0], pull_back(ones)[0])
        if has_aux:
            value = (value[0], (trunk_aux, value[1]))
        return value, grads, state

    return fn


def vector_fn(losses_fn, has_aux, args, kwargs):
    """Function of shared parameters and heads to losses and what to return."""

    def losses_of(shared_part, heads):
        value = losses_fn(merge(shared_part, heads), *args, **kwargs)
        losses = value[0] if has_aux else value
        return separate_losses(losses, _MAX_WRITTEN_OUT), value

    return losses_of


def separate_losses(losses: Any, limit: int) -> jax.Array | list[jax.Array]:
    """A list of named losses, up to a limit, otherwise a vector."""
    vector = stack_task_losses(losses)
    if hasattr(losses, "shape") or len(vector) > limit:
        return vector
    return [x.astype(vector.dtype) for x in map(jnp.asarray, jax.tree.leaves(losses))]


def _basis(losses):
    """Cotangents of each loss, stacked, in the structure of the losses."""
    # Unlike jnp.eye, this varies over devices under shard_map as the losses do.
    basis = jnp.diag(jnp.ones_like(tasks.stack_losses(losses, None)))
    return list(basis) if isinstance(losses, list) else basis


def _pull_back_each(push_forward, primals, losses):
    """Stacked gradients of all losses with respect to all arguments."""
    basis = _basis(losses)
    if not isinstance(losses, list):
        return jax.vmap(jax.linear_transpose(push_forward, *primals))(basis)
    rows = []
    for task in range(len(losses)):
        # Transposed by itself, so that only the head of this task is traversed.
        one = lambda *tangents, task=task: push_forward(*tangents)[task]
        rows.append(jax.linear_transpose(one, *primals)(basis[task][task]))
    return jax.tree.map(lambda *rows: jnp.stack(rows), *rows)


def stack_task_losses(losses: Any) -> jax.Array:
    """The losses that ``losses_fn`` returned, as one vector of shape ``(T,)``.

    Raises:
      ValueError: if they are neither a vector nor a tree of scalars.
    """
    leaves = jax.tree.leaves(losses)
    is_array = hasattr(losses, "shape")
    if not leaves or any(jnp.ndim(x) != is_array for x in leaves):
        raise ValueError(
            "losses_fn should return one loss for each task, as a vector of shape"
            " (T,) or a dict of scalars, but returned shapes"
            f" {jax.tree.map(jnp.shape, losses)}; do not sum the losses, and average"
            " each over its batch"
        )
    return tasks.stack_losses(losses, None)


def mask_of(params: optax.Params, shared: Mask | Callable | None) -> Mask:
    """A tree of bools with the structure of the parameters: which are shared."""
    mask = shared(params) if callable(shared) else shared
    return jax.tree.broadcast(True if mask is None else mask, params)


def split(tree: Any, shared: Mask | Callable | None) -> tuple[Any, Any]:
    """Separates the shared leaves from the others; None stands for a hole.

    Raises:
      TypeError: for leaves that are not floating point.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"the parameter params{jax.tree_util.keystr(path)} has dtype"
                f" {jnp.result_type(leaf)}, which has no gradient; hand it to losses_fn"
                " as another argument (with Flax NNX, split the model by nnx.Param)"
            )
    mask = mask_of(tree, shared)
    pick = lambda keep: jax.tree.map(lambda x, m: x if m is keep else None, tree, mask)
    return pick(True), pick(False)


def merge(shared_part: Any, heads: Any) -> Any:
    """The tree whose shared leaves and others :func:`split` separated."""
    is_hole = lambda x: x is None
    choose = lambda s, h: h if s is None else s
    return jax.tree.map(choose, shared_part, heads, is_leaf=is_hole)
