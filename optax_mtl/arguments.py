"""The arguments of a method: what is refused, and what stands for them inside.

Values that are traced pass: only what is known when the method is made is checked.
"""

from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from optax_mtl import names, tasks


def check_range(
    name: str, value: Any, interval: str, *, optional: bool = False
) -> None:
    """Refuses numbers outside an interval; traced ones pass.

    Args:
      name: of the argument, for the error.
      value: a number, or an array or sequence of numbers.
      interval: such as ``"[0, 1)"``: from 0 to 1, but not 1 itself.
      optional: whether it may be ``None``.

    Raises:
      TypeError: for something else than numbers.
      ValueError: for a number outside the interval, NaN included.
    """
    if (value is None and optional) or _is_traced(value):
        return
    low, high = map(float, interval[1:-1].split(","))
    numbers = np.asarray(value)
    if numbers.dtype.kind not in "iuf" and not jnp.issubdtype(numbers.dtype, float):
        raise TypeError(f"{name} is {value!r}; it should be a number in {interval}")
    above = numbers >= low if interval[0] == "[" else numbers > low
    below = numbers <= high if interval[-1] == "]" else numbers < high
    if not np.all(above & below):
        words = {"[0, inf)": "at least 0", "[1, inf)": "at least 1"}
        words |= {"(0, inf)": "positive", "(0, inf]": "positive"}
        words |= {"(-inf, inf)": "finite"}
        raise ValueError(
            f"{name} is {value}; it should be {words.get(interval, f'in {interval}')}"
        )


def check_count(
    name: str, value: Any, *, least: int = 1, optional: bool = False
) -> None:
    """Refuses what is not an integer of at least ``least``, and what is traced.

    Raises:
      TypeError: for a traced value.
      ValueError: for another value.
    """
    if value is None and optional:
        return
    check_static(name, value)
    is_integer = isinstance(value, (int, np.integer)) and not isinstance(value, bool)
    if not is_integer or value < least:
        raise ValueError(
            f"{name} is {value!r}; it should be an integer of at least {least}"
        )


def check_choice(name: str, value: Any, choices: Iterable[Any]) -> None:
    """Refuses what is not one of the choices, and what is traced.

    Raises:
      TypeError: for a traced value.
      ValueError: for another value.
    """
    check_static(name, value)
    if np.ndim(value) or value not in list(choices):
        *others, last = map(repr, choices)
        listed = f"{', '.join(others)} or {last}"
        raise ValueError(f"{name} is {value!r}; it should be {listed}")


def check_function(name: str, value: Any) -> None:
    """Refuses what is not a function, and what is traced.

    Raises:
      TypeError: for either.
    """
    check_static(name, value)
    if not callable(value):
        raise TypeError(f"{name} is {value!r}; it should be a function")


def as_transformation(name: str, tx: Any) -> optax.GradientTransformationExtraArgs:
    """What has an ``init`` and an ``update``, as a transformation with extra arguments.

    Raises:
      TypeError: for something else, such as the function that makes one.
    """
    if isinstance(tx, optax.GradientTransformation):
        return optax.with_extra_args_support(tx)
    if not hasattr(tx, "init") or not hasattr(tx, "update"):
        raise TypeError(
            f"{name} is {tx!r}, expected a gradient transformation: call what makes it,"
            " as in optax.chain(optax_mtl.upgrad(), optax.adamw(1e-3))"
        )
    return optax.GradientTransformationExtraArgs(tx.init, tx.update)


def check_dtype(name: str, dtype: Any) -> None:
    """Refuses a dtype that cannot hold gradients; ``None`` passes.

    Raises:
      TypeError: for it.
    """
    if dtype is not None and not jnp.issubdtype(dtype, jnp.inexact):
        raise TypeError(
            f"{name} is {dtype!r}; it should be floating point, such as jnp.float32"
        )


def check_static(name: str, value: Any) -> None:
    """Refuses JAX arrays, as which :func:`optax.inject_hyperparams` hands numbers on.

    Raises:
      TypeError: for one, with the remedy.
    """
    if isinstance(value, jax.Array):
        raise TypeError(
            f"{name} is a JAX array, but counts, flags, names and functions cannot vary"
            " over the steps: name it in optax.inject_hyperparams(...,"
            f' static_args=("{name}",)), or hand over a Python value'
        )


def _is_traced(value: Any) -> bool:
    return any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(value))


def check_primary(primary: Any, num_tasks: int | None = None) -> Any:
    """The number of the primary task, if it exists; a traced one passes.

    Raises:
      TypeError: for something else than an integer.
      ValueError: for a task that does not exist.
    """
    if _is_traced(primary):
        return primary
    number = np.asarray(primary)
    if number.dtype.kind not in "iu" or number.ndim:
        raise TypeError(
            f"primary is {primary!r}; it should be the number or the name of a task"
        )
    if number < 0 or (num_tasks is not None and number >= num_tasks):
        to = "0 on" if num_tasks is None else f"0 to {num_tasks - 1}"
        raise ValueError(f"primary={primary} should be the number of a task, from {to}")
    return primary


def check_preference(preference: names.PerTask | None) -> jax.Array | None:
    """Validates a preference over the tasks: at least 0, not all 0.

    Raises:
      TypeError: for something else than numbers.
      ValueError: for a negative entry, more than one axis, or zeros only.
    """
    if preference is None:
        return None
    if not _is_traced(preference):
        values = np.asarray(preference)
        if values.dtype.kind not in "biuf":
            raise TypeError(
                f"preference {preference!r} should be one number, or an array of one"
                " for each task, in the order of the losses, or a dict of one for each"
                " name of a task"
            )
        valid = np.all((values >= 0) & (values < np.inf)) and np.any(values)
        if values.ndim > 1 or not valid:
            raise ValueError(
                f"preference {values} should hold one finite number of at least 0 for"
                " each task, not all of them 0"
            )
    return jnp.asarray(preference, dtype=jnp.result_type(float))


def for_each_task(
    name: str, value: Any, num_tasks: int, dtype: jax.typing.DTypeLike | None = None
) -> jax.Array:
    """One number for each task, shape ``(T,)``, out of one for all or one for each.

    Raises:
      ValueError: for another number of them than T, with the name of the argument.
    """
    values = jnp.asarray(value, dtype)
    if values.shape not in ((), (num_tasks,)):
        raise ValueError(
            f"{name} has shape {values.shape}, but there are {num_tasks} tasks; give"
            " one number, or one for each task"
        )
    return jnp.broadcast_to(values, num_tasks)


def preference_among_present(
    preference: jax.Array | None, gram: jax.Array, default_total: float | None = None
) -> jax.Array:
    """The preference, zero for absent tasks, shape ``(T,)`` in the dtype of gram.

    Args:
      preference: as :func:`check_preference` returns it; ``None`` prefers none.
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      default_total: what the entries sum to without a preference, such as 1 for
        an average over the tasks that are present; ``None`` makes each entry 1.
    """
    exists = tasks.present(gram).astype(gram.dtype)
    return preference_where(preference, exists, default_total)


def preference_of_losses(preference: jax.Array | None, losses: jax.Array) -> jax.Array:
    """The preference, by default equal shares of 1; 0 where the loss is exactly 0."""
    exists = (losses != 0).astype(losses.dtype)
    return preference_where(preference, exists, default_total=1.0)


def preference_where(
    preference: jax.Array | None, exists: jax.Array, default_total: float | None = None
) -> jax.Array:
    """As :func:`preference_among_present`, of 1 for a task that is present, else 0."""
    if preference is not None:
        count, dtype = len(exists), exists.dtype
        return exists * for_each_task("preference", preference, count, dtype)
    if default_total is None:
        return exists
    return exists * (default_total / jnp.maximum(exists.sum(), 1))


def check_key(key: Any) -> None:
    """Refuses what is neither a seed nor a random key.

    Raises:
      TypeError: for it.
    """
    is_number = isinstance(key, (int, np.integer, np.ndarray, jax.Array))
    dtype = key.dtype if hasattr(key, "dtype") else np.result_type(type(key))
    is_key = _is_typed_key(dtype)
    is_seed = jnp.issubdtype(dtype, np.integer)
    # An array of numbers is the data of a key.
    is_seed &= np.ndim(key) == 0 or dtype == np.uint32
    if not is_number or not (is_key or is_seed):
        raise TypeError(
            f"key is {key!r}; it should be a seed, such as 0, or a random key, such as"
            " jax.random.key(0)"
        )


def key_data(key: int | jax.Array) -> jax.Array:
    """What a state keeps of a random key: numbers, which every serialiser takes.

    Args:
      key: a seed, a random key, or the data of one.

    Returns:
      The data of the key, ``uint32``, in a buffer of its own.
    """
    is_seed = jnp.issubdtype(jnp.result_type(key), np.integer) and np.ndim(key) == 0
    key = jax.random.key(key) if is_seed else jnp.asarray(key)
    return jnp.copy(jax.random.key_data(key) if _is_typed_key(key.dtype) else key)


def key_of(data: jax.Array, key: int | jax.Array) -> jax.Array:
    """The random key that a state keeps the data of.

    Args:
      data: as :func:`key_data` returns it.
      key: what the method was made with, for the kind of random numbers.

    Raises:
      TypeError: for the state of an older version, which kept the key itself.
    """
    if _is_typed_key(data.dtype):
        raise TypeError(
            "the state holds a random key, as it did in older versions, where its data"
            " are expected: convert it by optax.tree.unwrap_random_key_data(state)"
        )
    is_typed = _is_typed_key(jnp.result_type(key))
    impl = jax.random.key_impl(key) if is_typed else None
    return jax.random.wrap_key_data(data, impl=impl)


def _is_typed_key(dtype: Any) -> bool:
    return jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key)
