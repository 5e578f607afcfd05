"""Measure and combine the gradients of several tasks."""

import contextlib
import contextvars
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from optax_mtl import precise

# One megabyte of float32 fits the cache of a CPU core. Blocks pay off from eight.
_BLOCK_ELEMENTS, _MAX_IN_ONE_PIECE = 2**18, 2**21


class NeedsTaskGrads(TypeError):
    """Gradients are read where only their Gram matrix is known."""


class GramView:
    """Task gradients that are known only through their Gram matrix.

    Stands for stacked updates wherever a method reads nothing but inner
    products: :func:`gram` returns the matrix, :func:`combine` returns the
    weights, or the gradient that they make. Anything else is an error, since
    there are no gradients in it.

    Args:
      num_tasks: number of tasks, T.
      compute: returns the Gram matrix, shape ``(T, T)``. Called when a method
        asks for the matrix, and not at all by one that does not.
      combine: maps weights, shape ``(T,)``, to the weighted sum of the gradients,
        so that what follows a method in a chain receives a gradient. By default
        the weights take its place.
      combine_some: maps weights and the tasks to keep, both of shape ``(T,)``, to the
        sum over these alone, whatever the others hold, if there is a way to do so.
      compute_apart: the Gram matrix, at any price such that what is not finite in one
        task is so in its row and its column alone; by default ``compute``.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> view = optax_mtl.GramView(2, lambda: jnp.array([[18.0, -22], [-22, 38]]))
      >>> method = optax_mtl.mgda()
      >>> weights, _ = method.update(view, method.init(None))
      >>> print(jnp.array_str(weights, precision=3))
      [0.6 0.4]
    """

    def __init__(
        self,
        num_tasks: int,
        compute: Callable[[], jax.Array],
        combine: Callable[[jax.Array], optax.Updates] | None = None,
        combine_some: Callable[[jax.Array, jax.Array], optax.Updates] | None = None,
        compute_apart: Callable[[], jax.Array] | None = None,
    ):
        self.num_tasks = num_tasks
        self.compute = compute
        self.combine = combine or (lambda weights: weights)
        self.combine_some = combine_some
        self.compute_apart = compute_apart or compute

    def measured(self) -> "GramView":
        """The same gradients, measured now, and not again."""
        return self._known(self.compute())

    def apart(self) -> "GramView":
        """The same gradients, measured now, and apart as far as they can be."""
        return self._known(self.compute_apart())

    def _known(self, matrix: jax.Array) -> "GramView":
        return GramView(self.num_tasks, lambda: matrix, self.combine, self.combine_some)

    def refuse(self, reader: str = "this chain") -> NoReturn:
        """Raises the error that names the way to the gradients themselves."""
        raise NeedsTaskGrads(
            f"{reader} reads the task gradients themselves, but only their Gram matrix"
            " is known here: a chain begins with a method whose row in"
            " optax_mtl.METHODS reads 'gram' or 'losses', and nothing in front of it"
            " or around it reads gradients. For any other chain give"
            " optax_mtl.value_and_grad mode='stacked', or obtain the gradients with"
            " optax_mtl.value_and_task_grads"
        )


# Whatever maps over the leaves of the updates meets the error.
jax.tree_util.register_pytree_node(
    GramView, GramView.refuse, lambda _, parts: GramView(*parts)
)


# How the names begin that arrays get in the program where task gradients are read, if
# somebody asks for it; one name for all gradients that are read together.
READ = "task gradients are read, "
_READS: contextvars.ContextVar[Iterator[int] | None] = contextvars.ContextVar(
    "reads", default=None
)


@contextlib.contextmanager
def marking_reads() -> Iterator[Iterator[int]]:
    """Names the gradients by :data:`READ` and a number where they are read.

    Yields what counts the reads, of which the next number is that of reads so far.
    """
    reads = itertools.count()
    token = _READS.set(reads)
    try:
        yield reads
    finally:
        _READS.reset(token)


def check_stacked(
    updates: optax.Updates,
    params: optax.Params | None = None,
    num_tasks: int | None = None,
    *,
    gram_suffices: bool = False,
    reader: str = "this method",
) -> int | None:
    """Validates stacked task gradients at trace time and counts the tasks.

    Args:
      updates: tree whose leaves have shape ``(T, *p)``.
      params: parameters, leaves of shape ``p``; ``None`` skips that comparison.
      num_tasks: the T that the method was made for, if it has state.
      gram_suffices: whether a :class:`GramView` will do.
      reader: who reads the gradients, for the error about one.

    Returns:
      T; ``None`` for a group of :func:`optax.partition` that holds no leaf.

    Raises:
      TypeError: for a :class:`GramView` where gradients are read, and for
        leaves that are not floating point.
      ValueError: for leaves without a task axis, with different task axes or
        with shapes other than ``(T, *p)``, for an empty tree, and if T is not
        ``num_tasks``.
    """
    reads = _READS.get()
    name = f"{READ}{next(reads)}" if reads is not None else ""
    if isinstance(updates, GramView) and not gram_suffices:
        updates.refuse(reader)
    is_view = isinstance(updates, GramView)
    found = updates.num_tasks if is_view else _count_tasks(updates, params)
    if num_tasks is not None and found not in (None, num_tasks):
        raise ValueError(
            f"the method was made for num_tasks={num_tasks}, but the updates hold"
            f" the gradients of {found} tasks; make it with num_tasks={found}"
        )
    # Not where gram and combine are called by a method that is written elsewhere.
    if name and params is not None and not is_view:
        jax.tree.map(lambda x: checkpoint_name(x, name), updates)
    return found


def _count_tasks(updates: optax.Updates, params: optax.Params | None) -> int | None:
    leaves = jax.tree_util.tree_leaves_with_path(updates)
    if not leaves:
        is_masked = lambda x: isinstance(x, optax.MaskedNode)
        if jax.tree.leaves(updates, is_leaf=is_masked):
            return None
        raise ValueError(
            "the tree of task gradients has no array leaves; with Flax NNX, pass an"
            " nnx.State of gradients (a plain dict is filtered to nothing)"
        )
    (first_path, first), *_ = leaves
    shape_of = lambda path, x: f"updates{jax.tree_util.keystr(path)} {jnp.shape(x)}"
    for path, leaf in leaves:
        check_floating(
            f"updates{jax.tree_util.keystr(path)}",
            leaf,
            ": gradients are floating point; differentiate with respect to"
            " floating-point parameters only",
        )
    if params is not None:
        structures: list[Any] = [jax.tree.structure(x) for x in (updates, params)]
        try:
            jax.tree_util.tree_map_with_path(_check_leaf, updates, params)
        except ValueError as error:
            if structures[0] == structures[1]:
                raise
            raise ValueError(
                "the parameters that were handed to update are not those that the"
                " gradients were taken of; with Equinox, hand over"
                f" eqx.filter(model, eqx.is_inexact_array). {error}"
            ) from error
    for path, leaf in leaves:
        if jnp.ndim(leaf) == 0 or jnp.shape(leaf)[0] != jnp.shape(first)[0]:
            raise ValueError(
                f"every leaf needs the same leading task axis, but"
                f" {shape_of(path, leaf)} and {shape_of(first_path, first)} differ or"
                " have none; stack the gradients of the tasks, for example with"
                " optax_mtl.value_and_task_grads. Of gradients with heads that are not"
                " stacked, measure the shared part alone, as in"
                " optax_mtl.gram(grads['trunk']); in a chain, optax.partition routes"
                " the heads around the method"
            )
    if jnp.shape(first)[0] == 0:
        raise ValueError(
            f"{shape_of(first_path, first)} holds the gradients of no task: the leading"
            " axis is that of the tasks"
        )
    return jnp.shape(first)[0]


def _check_leaf(path: tuple[Any, ...], update: jax.Array, param: jax.Array) -> None:
    if jnp.ndim(update) == 0 or jnp.shape(update)[1:] != jnp.shape(param):
        raise ValueError(
            f"updates{jax.tree_util.keystr(path)} has shape {jnp.shape(update)}, but"
            f" the parameter has shape {jnp.shape(param)}: expected the gradients of"
            f" T tasks, (T, *{jnp.shape(param)}), for example from"
            " optax_mtl.value_and_task_grads; one method comes first in optax.chain,"
            " and no second (around a chain, optax_mtl.multi_steps takes the place of"
            " optax.MultiSteps)"
        )


def check_resolved(updates: optax.Updates, params: optax.Params) -> None:
    """Validates at trace time that updates may be added to the parameters.

    Args:
      updates: what a chain returned; ``None`` for a leaf is no update.
      params: parameters.

    Raises:
      ValueError: if the structure or a shape differs, or an update is complex where
        the parameter is real.
    """

    def check(path, param, update):
        if update is not None and jnp.shape(update) != jnp.shape(param):
            raise ValueError(
                f"the update of params{jax.tree_util.keystr(path)} has shape"
                f" {jnp.shape(update)}, the parameter {jnp.shape(param)}: begin the"
                " chain with a method, such as optax_mtl.linear(), which consumes the"
                " task axis of every leaf"
            )
        if jnp.iscomplexobj(update) and not jnp.iscomplexobj(param):
            raise ValueError(
                f"the update of params{jax.tree_util.keystr(path)} is complex, the"
                " parameter is real"
            )

    jax.tree_util.tree_map_with_path(check, params, updates)


def check_state_kept(state: optax.OptState, new_state: optax.OptState) -> None:
    """Validates at trace time that an update keeps the shapes of the state.

    Raises:
      ValueError: if the shape of a leaf changed, as where Adam stands before a method.
    """
    differing = differing_shapes(state, new_state)
    if differing:
        raise ValueError(
            f"the update changes the state of the chain: {differing}. What comes before"
            " the method sees the gradients of all tasks stacked: wrap it as"
            " optax_mtl.per_task(tx, num_tasks), or put it after the method"
        )


def differing_shapes(state: optax.OptState, other: optax.OptState) -> str:
    """The first leaf by which the second state differs from the first, if any."""
    shapes_of = lambda tree: {
        jax.tree_util.keystr(path): jnp.shape(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    shapes, others = shapes_of(state), shapes_of(other)
    for path in shapes | others:
        shape, found = shapes.get(path, "none"), others.get(path, "none")
        if shape != found:
            return f"state{path} has shape {found}, expected {shape}"
    return ""


def check_floating(where: str, leaf: Any, remedy: str) -> None:
    """Validates that a leaf is an array of floating-point or complex numbers.

    Raises:
      TypeError: if it is not.
    """
    if not hasattr(leaf, "dtype") and not isinstance(leaf, (int, float, complex)):
        raise TypeError(
            f"{where} is {leaf!r}, which is no array: split the tree, and hand the rest"
            " to losses_fn as another argument (with Equinox,"
            " eqx.partition(model, eqx.is_inexact_array); with Flax NNX, nnx.split by"
            " nnx.Param)"
        )
    if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
        raise TypeError(f"{where} has dtype {jnp.result_type(leaf)}{remedy}")


def stack_losses(losses: Any, num_tasks: int | None, name: str = "losses") -> jax.Array:
    """Returns the losses of the tasks as one vector of shape ``(num_tasks,)``.

    Args:
      losses: vector, or tree (such as a dict) of scalars in the order of its
        leaves, sorted by key.
      num_tasks: the length expected; ``None`` accepts any.
      name: what they are called, for the error about their shape.

    Returns:
      The losses, in float32 or better.

    Raises:
      TypeError: if ``losses`` is ``None`` or complex.
      ValueError: if the shape is another.
    """
    if losses is None:
        raise TypeError(
            "this method reads the losses of the tasks: call update(updates, state,"
            " params, losses=losses), with Flax NNX optimizer.update(model, grads,"
            " losses=losses), with optax_mtl.linen.TrainState"
            " state.apply_gradients(grads=grads, losses=losses)"
        )
    leaves = jax.tree.leaves(losses)
    for leaf in leaves:
        if isinstance(leaf, str):
            raise TypeError(f"losses hold {leaf!r}, expected one number for each task")
    vector = leaves[0] if len(leaves) == 1 and jnp.ndim(leaves[0]) else leaves
    vector = jnp.asarray(vector)
    if jnp.iscomplexobj(vector):
        raise TypeError(
            f"losses have dtype {vector.dtype}, but only real numbers can be minimised:"
            " take the real part or the absolute value"
        )
    if vector.ndim != 1 or not len(vector) or num_tasks not in (None, len(vector)):
        raise ValueError(
            f"{name} have shape {vector.shape}, expected one scalar for each of the"
            f" {num_tasks} tasks, as a vector ({num_tasks},) or a dict of scalars"
        )
    return vector.astype(precise.float_dtype(vector.dtype))


def unstack_losses(vector: jax.Array, like: Any) -> Any:
    """The vector ``(T,)`` in the structure, and with the names, of other losses."""
    leaves, structure = jax.tree.flatten(like)
    if len(leaves) != len(vector) or any(jnp.ndim(leaf) for leaf in leaves):
        return vector
    return jax.tree.unflatten(structure, list(vector))


def names_of(losses: Any) -> list[str] | None:
    """The names of the tasks, in the order of the gradients; ``None`` without any.

    Args:
      losses: a dict of scalars, or a tree of dicts; for anything else there are none.

    Raises:
      ValueError: if two have one name, as in ``{"a": {"b": 1.0}, "a/b": 2.0}``.

    Examples:
      >>> from optax_mtl import tasks
      >>> tasks.names_of({"task2": 1.0, "task10": 2.0})
      ['task10', 'task2']
    """
    leaves = jax.tree_util.tree_leaves_with_path(losses)
    paths = [path for path, leaf in leaves if np.ndim(leaf) == 0]
    is_name = lambda key: isinstance(
        key, (jax.tree_util.DictKey, jax.tree_util.GetAttrKey)
    )
    if not paths or len(paths) < len(leaves):
        return None
    if not all(path and all(map(is_name, path)) for path in paths):
        return None
    names = [jax.tree_util.keystr(p, simple=True, separator="/") for p in paths]
    check_names_differ(names)
    return names


def check_names_differ(names: Sequence[str]) -> None:
    """Refuses a name for two tasks.

    Raises:
      ValueError: for it.
    """
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two tasks have the name {name!r}, of {', '.join(map(repr, names))};"
                " rename one"
            )


def check_same_names(losses: Any, others: Any, name: str) -> None:
    """Refuses numbers by name that are those of other tasks than the losses.

    Raises:
      ValueError: if both have names, and these differ, or if there are losses without
        names, of which nobody knows which is which.
    """
    expected, found = names_of(losses), names_of(others)
    several = any(np.ndim(x) for x in jax.tree.leaves(losses))  # Not that of one task.
    if found and several and expected is None:
        raise ValueError(
            f"{name} have names, {', '.join(map(repr, found))}, but the losses have"
            f" none: hand over both as a dict, or {name} in the order of the losses"
        )
    if expected and found and expected != found:
        raise ValueError(
            f"{name} are those of the tasks {', '.join(map(repr, found))}, but the"
            f" losses are those of {', '.join(map(repr, expected))}; use the same names"
        )


def gram(updates: optax.Updates) -> jax.Array:
    r"""Gram matrix of the task gradients, in one pass over them.

    .. math::

      G_{ij} = \langle g_i, g_j \rangle

    Args:
      updates: stacked gradients, leaves of shape ``(T, *p)``; or a
        :class:`GramView`.

    Returns:
      Array of shape ``(T, T)``, accumulated at full precision in float32 (in
      float64 for float64 gradients) whatever the dtypes of the leaves.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> print(optax_mtl.gram(jnp.array([[-4.0, 1, 1], [6, 1, 1]])))
      [[ 18. -22.]
       [-22.  38.]]
    """
    if isinstance(updates, GramView):
        return updates.compute()
    check_stacked(updates)
    (products,) = inner_products(updates, updates)
    return products


def inner_products(
    updates: optax.Updates, *others: optax.Updates
) -> tuple[jax.Array, ...]:
    """Inner products of stacked gradients with others, in one pass over all.

    Args:
      updates: stacked gradients, leaves of shape ``(T, *p)``.
      *others: trees of the same structure, such as the updates themselves or those
        of another step, leaves of shape ``(S, *p)``.

    Returns:
      An array of shape ``(T, S)`` for each of the others, in the precision that
      :func:`gram` has.

    Examples:
      >>> import jax.numpy as jnp
      >>> from optax_mtl import tasks
      >>> updates, last = jnp.array([[-4.0, 1, 1], [6, 1, 1]]), jnp.array([[0.0, 1, 1]])
      >>> print(tasks.inner_products(updates, last)[0])
      [[2.]
       [2.]]
    """
    leaves = [jax.tree.leaves(tree) for tree in (updates, *others)]
    products = [_leaf_products(*same) for same in zip(*leaves, strict=True)]
    return tuple(sum_leaves(parts) for parts in zip(*products, strict=True))


def sum_leaves(parts: Sequence[jax.Array]) -> jax.Array:
    """Sum of what the leaves contribute, arrays of one shape, computed once.

    Where each leaf reads it, XLA would write a sum of all into the expression of each,
    and compile in the square of their number. It does not with a matrix product.
    """
    if len(parts) == 1:
        return parts[0]
    stacked = jnp.stack(parts)
    rows = stacked.reshape(len(parts), -1)
    # A product of vectors is a sum to XLA, of two rows and more it is not.
    ones = jnp.ones((2, len(parts)), rows.dtype)
    total = jnp.matmul(ones, rows, precision=jax.lax.Precision.HIGHEST)[0]
    return total.reshape(stacked.shape[1:])


def on_one_cpu(x: jax.Array) -> bool:
    """Whether there is one device, a CPU: nothing is sharded, and XLA needs help."""
    is_cpu = jax.default_backend() == "cpu" and jax.device_count() == 1
    return is_cpu and jax.typeof(x).sharding.mesh.empty


def _leaf_products(x: jax.Array, *others: jax.Array) -> tuple[jax.Array, ...]:
    if on_one_cpu(x):
        # XLA's CPU contraction wants one axis, and over a huge one it runs from memory;
        # blocks run from cache.
        x, others = jax.tree.map(lambda y: y.reshape(len(y), -1), (x, others))
        if x.size > _MAX_IN_ONE_PIECE:
            return _products_in_blocks(_BLOCK_ELEMENTS // len(x), x, *others)
    # Contracting all trailing axes as they are keeps a sharded leaf sharded.
    axes = tuple(range(1, x.ndim))
    return tuple(contract(x, y, axes).real for y in others)


def contract(x: jax.Array, y: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Sum over some axes of ``x * y.conj()``, in the precision that :func:`gram` has.

    The result has the other axes of both, and is whole on every device.
    """
    kwargs = {}
    mesh = jax.typeof(x).sharding.mesh
    if AxisType.Explicit in mesh.axis_types:
        kwargs["out_sharding"] = NamedSharding(mesh, PartitionSpec())
    return jax.lax.dot_general(
        x,
        y.astype(x.dtype).conj(),
        ((axes, axes), ((), ())),
        precision=jax.lax.Precision.HIGHEST,
        preferred_element_type=jnp.promote_types(x.dtype, jnp.float32),
        **kwargs,
    )


def _products_in_blocks(size: int, *matrices: jax.Array) -> tuple[jax.Array, ...]:
    """Products of matrices of shape ``(T, P)``, ``size`` columns at a time."""
    size = max(size, 1)
    full = matrices[0].shape[1] // size
    block = lambda i: [
        jax.lax.dynamic_slice_in_dim(y, i * size, size, axis=1) for y in matrices
    ]
    add = lambda i, total: jax.tree.map(jnp.add, total, _leaf_products(*block(i)))
    total = _leaf_products(*(y[:, full * size :] for y in matrices))
    return jax.lax.fori_loop(0, full, add, total)


def combine(weights: jax.Array, updates: optax.Updates) -> optax.Updates:
    r"""Weighted sum of the task gradients, in one pass over them.

    .. math::

      d = \sum_i w_i g_i

    Args:
      weights: array of shape ``(T,)``.
      updates: stacked gradients, leaves of shape ``(T, *p)``; or a
        :class:`GramView`.

    Returns:
      Tree with leaves of shape ``p`` and the dtypes of the gradients; for a
      :class:`GramView`, what its ``combine`` makes of the weights.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[-4.0, 1, 1], [6, 1, 1]])
      >>> print(optax_mtl.combine(jnp.array([0.5, 0.25]), updates))
      [-0.5   0.75  0.75]
    """
    is_view = isinstance(updates, GramView)
    count = updates.num_tasks if is_view else check_stacked(updates)
    if count is not None and jnp.shape(weights) != (count,):
        raise ValueError(
            f"expected one weight for each of the {count} tasks, shape ({count},), got"
            f" weights of shape {jnp.shape(weights)}"
        )
    if is_view:
        return updates.combine(weights)

    def combine_leaf(x):
        # Low-precision gradients are summed in the precision of the weights.
        out = jnp.tensordot(weights, x, axes=1, precision=jax.lax.Precision.HIGHEST)
        return out.astype(x.dtype)

    return jax.tree.map(combine_leaf, updates)


def present(gram: jax.Array) -> jax.Array:
    """Which tasks have a gradient that is not exactly zero, shape ``(T,)``.

    A task without one, such as a task whose labels are missing in a batch, is
    absent: methods behave as if it did not exist.
    """
    return jnp.diagonal(gram) > 0


def along_tasks(vector: jax.typing.ArrayLike, like: jax.Array) -> jax.Array:
    """One number for each task, ``(T,)``, as an array to multiply a stacked leaf by."""
    return jnp.expand_dims(vector, tuple(range(1, like.ndim)))


def has_gradient(updates: optax.Updates) -> jax.Array:
    """Which tasks have a gradient that is not exactly zero, shape ``(T,)``."""
    sizes = [largest(x, tuple(range(1, x.ndim))) for x in jax.tree.leaves(updates)]
    return sum_leaves([(size != 0).astype(float) for size in sizes]) > 0


def largest(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Largest magnitude along some axes, of a complex number that of its larger part.

    Tells zeros and numbers that are not finite, in half the time and memory of
    ``jnp.any`` on a CPU, where XLA stores what it compared.
    """
    if jnp.iscomplexobj(x):
        return jnp.maximum(largest(x.real, axes), largest(x.imag, axes))
    return jnp.max(jnp.abs(x), axis=axes, initial=0)


def squared_norms(updates: optax.Updates) -> jax.Array:
    """Squared norms of the task gradients, shape ``(T,)``, in float32 or better.

    Not finite for a gradient that is not, nor for one that is too large to be squared:
    no method can measure it.
    """
    if isinstance(updates, GramView):
        return jnp.diagonal(gram(updates))

    def square(x):
        y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        axes = tuple(range(1, x.ndim))
        return jnp.sum((y * y.conj()).real, axis=axes)

    return sum_leaves([square(x) for x in jax.tree.leaves(updates)])


def scale_tasks(factors: jax.Array, updates: optax.Updates) -> optax.Updates:
    """Multiplies the gradient of each task by its own factor, shape ``(T,)``."""
    if isinstance(updates, GramView):
        some = updates.combine_some
        products = jnp.outer(factors, factors)
        return GramView(
            updates.num_tasks,
            lambda: products * gram(updates),
            lambda weights: combine(factors * weights, updates),
            some and (lambda weights, keep: some(factors * weights, keep)),
            lambda: products * updates.compute_apart(),
        )
    scale = lambda x: (along_tasks(factors, x) * x).astype(x.dtype)
    return jax.tree.map(scale, updates)


def finite_tasks(updates: optax.Updates) -> jax.Array:
    """Which tasks have finite gradients that can be squared, shape ``(T,)``."""
    return jnp.isfinite(squared_norms(updates))


def drop_tasks(keep: jax.Array, updates: optax.Updates) -> optax.Updates:
    """Sets the gradients of all but some tasks to 0, also those that are not finite.

    Args:
      keep: which tasks to keep, shape ``(T,)``.
      updates: stacked gradients, leaves of shape ``(T, *p)``; or a
        :class:`GramView`.

    Returns:
      Stacked gradients or a view of them.
    """
    if isinstance(updates, GramView):

        def combine_all(weights):
            # Without a way around the others, what is left of none is still zero.
            some = lambda x: jnp.where(keep.any(), x, 0)
            return jax.tree.map(some, updates.combine(weights))

        def combine_kept(weights):
            weights = jnp.where(keep, weights, 0)
            combine_some = updates.combine_some
            if combine_some is None:
                return combine_all(weights)
            return jax.lax.cond(
                keep.all(),
                lambda: updates.combine(weights),
                lambda: combine_some(weights, keep),
            )

        both = jnp.outer(keep, keep)
        matrix = jnp.where(both, gram(updates), 0)
        return GramView(updates.num_tasks, lambda: matrix, combine_kept)
    drop = lambda x: jnp.where(along_tasks(keep, x), x, 0)
    return jax.tree.map(drop, updates)
