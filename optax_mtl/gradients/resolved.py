"""The losses and the resolved gradient, in one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.extend.core import get_opaque_trace_state

from optax_mtl import arguments, tasks
from optax_mtl.gradients.backward import (
    MAX_APART,
    are_few,
    basis_of,
    pull_back_each,
    pull_back_in_turn,
    pull_back_some,
    take_aux,
    vector_fn,
)
from optax_mtl.gradients.disjoint import warn_of_own_data
from optax_mtl.gradients.measured import (
    measure_on_part,
    measured_gram,
    split_measured,
)
from optax_mtl.gradients.own_data import own_resolved
from optax_mtl.gradients.resolver import Resolver, resolve, with_optimizer
from optax_mtl.gradients.sharing import merge, split
from optax_mtl.labels import Labels


def value_and_grad(
    losses_fn: Callable[..., Any],
    method: optax.GradientTransformation,
    has_aux: bool = False,
    *,
    mode: str = "auto",
    shared: Labels | None = None,
    measure: Labels | None = None,
    own_data: bool = False,
    optimizer: optax.GradientTransformation | None = None,
) -> Resolver:
    r"""Makes a function that returns the losses and the resolved gradient.

    .. math::

      d = J^\top w(J J^\top),

    where :math:`J` is the Jacobian of the losses. A method that reads the losses alone
    takes one backward pass in all; one that reads the Gram matrix
    :math:`J J^\top` never holds more of :math:`J` than its mode says.

    Args:
      losses_fn: as in :func:`value_and_task_grads`.
      method: any method whose weights depend on the Gram matrix and the losses, or a
        chain that begins with one: what follows the method receives the gradient
        that it resolved, with ``shared`` that of the shared part alone.
      has_aux: whether ``losses_fn`` returns a pair, losses and auxiliary data.
      mode: how to get there; the result is the same.

        - ``"auto"``: the gradients of all tasks where the method reads gradients, and
          where they are few and small (6 tasks, 256 MB together); ``"leafwise"``
          otherwise.
        - ``"stacked"``: T backward passes, and the gradients of all tasks.
        - ``"leafwise"``: the Gram matrix from the gradients of all tasks, of which
          the compiler can free one leaf after the other; then one more backward pass,
          of the weighted losses.
        - ``"gram"``: for each task, one pull-back and one push-forward of its result
          give a column of the Gram matrix, :math:`J (J^\top e_i)`, then one backward
          pass. No more than one gradient is held at a time, so that memory does not
          grow with T, for up to twice the time of the others.

        All but ``"gram"`` also serve models with a ``jax.custom_vjp``, through which
        nothing can be pushed forward.
      shared: which parameters the method resolves, as in
        :func:`value_and_task_grads`; the others get the gradient of the sum.
      measure: of which of the shared parameters the method sees the inner products,
        in the forms of ``shared``; the weights that it makes of them go to all. The
        last shared layer, ``lambda path: "layer_7" in path``, takes T backward passes
        down to that layer in the place of T through the trunk, in every mode but
        ``"stacked"``. A task whose gradient is zero there is absent. ``None``: all.
      own_data: whether each task has data of its own, as in
        :func:`value_and_task_grads`: ``losses_fn`` returns the loss of one task, and
        all of them cost one pass over the data, or two where not all gradients are
        held; the mode ``"gram"`` is the same as ``"leafwise"`` then.
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
      TypeError: at the call, for a method that reads the gradients themselves in a
        mode that does not hold them, for a chain without a method, and for parameters
        that are not floating point.
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
      slower inside a loop, which ``"gram"`` is: it is not for them. With
      ``jax.checkpoint(losses_fn)``, ``"gram"`` takes little more memory than the
      plain sum, for up to one and a half times its time.
    """
    arguments.check_choice("has_aux", has_aux, (True, False))
    arguments.check_choice("mode", mode, ("auto", "gram", "leafwise", "stacked"))
    arguments.check_choice("own_data", own_data, (True, False))
    method = arguments.as_transformation("method", method)
    init_call = "the init of what value_and_grad returns: resolve.init(params)"

    def init(params):
        return method.init(split(params, shared)[0])

    def fn(params, state, *args, **kwargs):
        primals = split(params, shared)
        losses_of = vector_fn(losses_fn, has_aux, args, kwargs)
        losses, push_forward, value = jax.linearize(losses_of, *primals, has_aux=True)
        named, _ = take_aux(value, has_aux)
        like, part = primals[0], None
        if measure is not None:
            part = split_measured(params, like, measure)

        def before_all_passes():
            # Named losses have passes of their own, but not one for each column.
            if mode == "gram" or not isinstance(losses, list):
                warn_of_own_data(losses_fn, has_aux, params, args, kwargs, len(losses))

        def resolve_all():
            before_all_passes()
            updates = pull_back_each(push_forward, primals, losses)[0]
            chain = method if part is None else measure_on_part(method, *part)
            return resolve(chain, updates, state, like, named, init_call)

        def compute():
            if part is not None:
                return measured_gram(push_forward, primals, losses, part)
            before_all_passes()
            return known.compute()

        if mode == "stacked":
            grads, state = resolve_all()
        else:
            known = _view(mode, push_forward, primals, losses)
            apart = known.compute_apart if part is None else compute
            ways = known.combine, known.combine_some, apart
            view = tasks.GramView(known.num_tasks, compute, *ways)
            try:
                grads, state = resolve(method, view, state, like, named, init_call)
            except tasks.NeedsTaskGrads:
                if mode != "auto":
                    raise
                grads, state = resolve_all()
        ones = jax.tree.map(jnp.ones_like, losses)
        pull_back = jax.linear_transpose(push_forward, *primals)
        return value, merge(grads, pull_back(ones)[1]), state

    if own_data:
        options = mode, shared, measure, init_call
        fn = own_resolved(losses_fn, method, has_aux, *options)
    resolver = Resolver(init, fn)
    if optimizer is None:
        return resolver
    return with_optimizer(resolver, optimizer, has_aux, init_call)


def _view(mode, push_forward, primals, losses):
    """The gradients of the losses, known by what the mode asks of the model."""
    vector = tasks.stack_losses(losses, None)
    pull_back = jax.linear_transpose(push_forward, *primals)
    listed = isinstance(losses, list)

    def pull_back_all():
        return pull_back_each(push_forward, primals, losses)[0]

    def leafwise():
        return tasks.gram(pull_back_all())

    def by_columns(pull_back_task=lambda _, cotangent: pull_back(cotangent)[0]):
        return _gram_by_columns(push_forward, primals, losses, pull_back_task)

    def combine(weights):
        weights = weights.astype(vector.dtype)
        return pull_back(list(weights) if listed else weights)[0]

    compute = apart = by_columns if mode == "gram" else leafwise
    if mode == "auto" and are_few(len(vector), primals[0]):
        trace_of_view = get_opaque_trace_state(convention="optax_mtl")
        kept: list[Any] = []

        def compute():
            gradients = pull_back_all()
            # Those that a branch computes are not there outside of it.
            if trace_of_view == get_opaque_trace_state(convention="optax_mtl"):
                kept[:] = [gradients]
            return tasks.gram(gradients)

        combine_anew = combine

        def combine(weights):
            return tasks.combine(weights, *kept) if kept else combine_anew(weights)

        def combine_kept(weights, keep):
            (gradients,) = kept or [pull_back_all()]
            return tasks.combine(weights, tasks.drop_tasks(keep, gradients))

        return tasks.GramView(len(vector), compute, combine, combine_kept)

    if not listed or len(losses) > MAX_APART:
        return tasks.GramView(len(vector), compute, combine)

    def combine_some(weights, keep):
        weights = list(weights.astype(vector.dtype))
        return pull_back_some(push_forward, primals, weights, keep)[0]

    def pull_back_apart(task, cotangent):
        return pull_back_in_turn(push_forward, primals, losses)(task, cotangent)[0]

    if mode == "gram":
        apart = lambda: by_columns(pull_back_apart)
    return tasks.GramView(len(vector), compute, combine, combine_some, apart)


def _gram_by_columns(push_forward, primals, losses, pull_back_task):
    """The Gram matrix by a pull-back and a push-forward for each task."""
    vector = tasks.stack_losses(losses, None)
    # Linearized again to leave out the heads, not to multiply them by zero.
    zeros = optax.tree.zeros_like(primals)
    try:
        _, push = jax.linearize(lambda x: push_forward(x, zeros[1]), zeros[0])
    except (NotImplementedError, TypeError) as error:
        raise TypeError(
            "gradients cannot be pushed forward through this model, which probably has"
            " a jax.custom_vjp; use mode='leafwise'"
        ) from error

    def push_vector(grads):
        # The tangent along a gradient: that of a complex parameter is the conjugate
        # of what JAX calls its gradient.
        return tasks.stack_losses(push(optax.tree.conj(grads)), None)

    def column(inputs):
        task, cotangent = inputs
        # A branch, always taken, since XLA finishes what precedes a branch: in one
        # piece, all layers would be pulled and pushed at once.
        return jax.lax.cond(
            tasks.stack_losses(cotangent, None).sum() > 0,
            push_vector,
            lambda _: jnp.zeros_like(vector),
            pull_back_task(task, cotangent),
        )

    # A loop, since written out XLA would hold the gradients of all tasks.
    gram = jax.lax.map(column, (jnp.arange(len(vector)), basis_of(losses)))
    return (gram + gram.T) / 2
