"""The losses and the resolved gradient, in one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, tasks
from optax_mtl.gradients.backward import (
    basis_of,
    pull_back_each,
    pull_back_in_turn,
    pull_back_some,
    take_aux,
    vector_fn,
)
from optax_mtl.gradients.resolver import Resolver, resolve, with_optimizer
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.gradients.stacked import value_and_task_grads
from optax_mtl.labels import Labels, mask_of


def value_and_grad(
    losses_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    mode: str = "gram",
    shared: Labels | None = None,
    optimizer: optax.GradientTransformation | None = None,
) -> Resolver:
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
      method: any method whose weights depend on the Gram matrix and the losses, or a
        chain that begins with one: what follows the method receives the gradient
        that it resolved, with ``shared`` that of the shared part alone.
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
      optimizer: makes updates of all parameters, shared or not, out of that gradient;
        the losses reach it as ``losses_fn`` returns them, as in a chain.

    Returns:
      A function of the parameters, the state and further arguments that returns
      ``(losses, grads, state)``, or ``((losses, aux), grads, state)``. With an
      ``optimizer``, there are updates in the place of ``grads``, and the state is a
      pair, that of the method and that of the optimizer, as
      ``optax.chain(method, optimizer)`` has it. Its ``init`` makes the first state
      from the parameters; it is the same in every mode, so that one run may go on in
      another mode. After a whole chain, ``grads`` are the updates of the shared
      parameters and the gradients of the others.

    Raises:
      TypeError: at the call, for a method that reads the gradients themselves,
        for a chain without a method, and for parameters that are not floating point.
      ValueError: for an unknown mode; at the call, if the losses are neither a
        vector nor scalars, or not as many as the method was made for, and for a
        state or a result of other shapes.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> losses_fn = lambda x: {"a": ((x - 1) ** 2).sum(), "b": (x**2).sum()}
      >>> method = optax_mtl.cagrad()
      >>> fn = optax_mtl.value_and_grad(losses_fn, method)
      >>> params = jnp.array([0.0, 1.0])
      >>> losses, grads, state = fn(params, fn.init(params))
      >>> print(jnp.array_str(grads, precision=3))
      [-1.207  1.207]
      >>> import optax
      >>> fn = optax_mtl.value_and_grad(losses_fn, method, optimizer=optax.sgd(0.1))
      >>> losses, updates, state = fn(params, fn.init(params))
      >>> print(jnp.array_str(updates, precision=3))
      [ 0.121 -0.121]

    .. note::
      The entries of the Gram matrix have the precision of the model's own forward
      pass: compute losses in float32, and mind ``jax_default_matmul_precision``.
      Under :func:`jax.shard_map`, average the losses over the devices inside
      ``losses_fn``. On a CPU, XLA runs the backward pass of a convolution much
      slower inside a loop, which ``"gram"`` is: prefer ``"leafwise"`` there. With
      ``jax.checkpoint(losses_fn)``, ``"gram"`` takes little more memory than the
      plain sum, for up to one and a half times its time.
    """
    arguments.check_choice("has_aux", has_aux, (True, False))
    if mode not in ("gram", "leafwise", "stacked"):
        raise ValueError(
            f"mode should be 'gram', 'leafwise' or 'stacked', not {mode!r}"
        )
    method = optax.with_extra_args_support(method)
    init_call = "the init of what value_and_grad returns: resolve.init(params)"

    def init(params):
        return method.init(split(params, shared)[0])

    def from_gram(params, state, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(losses_fn, has_aux, args, kwargs)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        pull_back = jax.linear_transpose(push_forward, *primals)
        vector = tasks.stack_losses(losses, None)
        named, _ = take_aux(value, has_aux)

        def compute_gram(pull_back_task=lambda _, cotangent: pull_back(cotangent)[0]):
            if mode == "leafwise":
                return tasks.gram(pull_back_each(push_forward, primals, losses)[0])
            # Linearized again to leave out the heads, not to multiply them by zero.
            zeros = optax.tree.zeros_like(primals)
            try:
                _, push = jax.linearize(lambda x: push_forward(x, zeros[1]), zeros[0])
            except (NotImplementedError, TypeError) as error:
                raise TypeError(
                    "gradients cannot be pushed forward through this model, which"
                    " probably has a jax.custom_vjp; use mode='leafwise'"
                ) from error

            def push_vector(grads):
                # The tangent along a gradient: that of a complex parameter is the
                # conjugate of what JAX calls its gradient.
                return tasks.stack_losses(push(optax.tree.conj(grads)), None)

            def column(inputs):
                task, cotangent = inputs
                # A branch, always taken, since XLA finishes what precedes a branch:
                # in one piece, all layers would be pulled and pushed at once.
                return jax.lax.cond(
                    tasks.stack_losses(cotangent, None).sum() > 0,
                    push_vector,
                    lambda _: jnp.zeros_like(vector),
                    pull_back_task(task, cotangent),
                )

            # A loop, since written out XLA would hold the gradients of all tasks.
            inputs = jnp.arange(len(vector)), basis_of(losses)
            gram = jax.lax.map(column, inputs)
            return (gram + gram.T) / 2

        def pull_back_apart(task, cotangent):
            return pull_back_in_turn(push_forward, primals, losses)(task, cotangent)[0]

        def combine(weights):
            weights = weights.astype(vector.dtype)
            listed = isinstance(losses, list)
            return pull_back(list(weights) if listed else weights)[0]

        def combine_some(weights, keep):
            weights = list(weights.astype(vector.dtype))
            return pull_back_some(push_forward, primals, weights, keep)[0]

        view = tasks.GramView(len(vector), compute_gram, combine)
        if isinstance(losses, list):  # Losses that can be pulled back one by one.
            view = tasks.GramView(
                len(vector),
                compute_gram,
                combine,
                combine_some,
                lambda: compute_gram(pull_back_apart),
            )
        grads, state = resolve(method, view, state, primals[0], named, init_call)
        ones = jax.tree.map(jnp.ones_like, losses)
        return value, merge(grads, pull_back(ones)[1]), state

    def from_stacked(params, state, *args, **kwargs):
        task_grads = value_and_task_grads(losses_fn, has_aux, shared=shared)
        value, updates = task_grads(params, *args, **kwargs)
        losses, _ = take_aux(value, has_aux)
        mask = mask_of(params, shared, "shared")
        stacked, heads = split(updates, mask)
        shared_part, _ = split(params, mask)
        grads, state = resolve(method, stacked, state, shared_part, losses, init_call)
        return value, merge(grads, heads), state

    resolver = Resolver(init, from_stacked if mode == "stacked" else from_gram)
    if optimizer is None:
        return resolver
    return with_optimizer(resolver, optimizer, has_aux, init_call)
