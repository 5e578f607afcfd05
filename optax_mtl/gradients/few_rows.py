"""The Gram matrix of tasks that have few rows of data each, down to one example.

The gradient of a matrix is a sum over rows, the inputs of its product times the
gradients of the outputs, so that

    <g_i, g_j>  =  sum over rows r, s of  <x_ir, x_js> <d_ir, d_js>

needs no gradient: for T tasks of n rows, T^2 n^2 (a + b) operations for a matrix of
shape (a, b) in the place of T^2 a b, and the memory of the activations. Taken for each
parameter that the loss of a task uses once, as the matrix of a product (or transposed,
reshaped or cast before), where it is less work. All others have their T gradients, one
parameter after the other: those used twice, looked up, convolved with, and what is
inside a scan, ``jax.checkpoint`` or a function with a derivative of its own.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.extend.core import Literal
from jax.interpreters.partial_eval import dce_jaxpr

from optax_mtl import tasks

# What holds the same entries has the same inner products.
_SAME_ENTRIES = frozenset(
    "convert_element_type copy expand_dims reshape squeeze transpose".split()
)


class _Leaf(NamedTuple):
    """A parameter within the program of the loss."""

    number: int
    value: jax.Array


class _Product(NamedTuple):
    """A product of an array and a matrix, the leaf."""

    array: jax.Array
    output: jax.Array
    summed: tuple[int, ...]  # Axes of the array.
    made: tuple[int, ...]  # Axes of the output that the matrix brings.

    def is_cheap(self, num_tasks: int) -> bool:
        """Whether its rows are fewer operations than T gradients of the matrix."""
        a = math.prod(self.array.shape[axis] for axis in self.summed)
        b = math.prod(self.output.shape[axis] for axis in self.made)
        n = math.prod(self.array.shape) // max(a, 1)
        return num_tasks * n**2 * (a + b) < a * b * (n + num_tasks)


def gram_of_tasks(
    loss_fn: Callable[..., jax.Array], params: Any, args: tuple[Any, ...]
) -> jax.Array:
    """Gram matrix of the gradients of the tasks, shape ``(T, T)``.

    Args:
      loss_fn: parameters and the data of one task to its loss.
      params: what the gradients are taken of.
      args: the data of all tasks, arrays with a leading task axis.
    """
    params, args = jax.tree.map(jnp.asarray, (params, args))
    leaves, structure = jax.tree.flatten(params)
    num_tasks = len(jax.tree.leaves(args)[0])
    chosen: dict[int, _Product] = {}

    def of_one(args):
        tree_of = lambda leaves: jax.tree.unflatten(structure, leaves)
        of_leaves = lambda *leaves: loss_fn(tree_of(leaves), *args)
        program = jax.make_jaxpr(of_leaves)(*leaves)
        # Without what serves auxiliary data alone.
        jaxpr, _ = dce_jaxpr(program.jaxpr, [True], instantiate=True)
        evaluate = functools.partial(_evaluate, jaxpr, program.consts)
        chosen.update(_choose(evaluate, leaves, num_tasks))
        marked = {i: _Leaf(i, leaves[i]) for i in chosen}
        others = {i: x for i, x in enumerate(leaves) if i not in chosen}
        # Laid out over devices as the outputs are.
        probes = {i: jnp.zeros_like(x.output) for i, x in chosen.items()}

        def loss_at(others, probes):
            arrays = {}

            def add_probe(i, product):
                arrays[i] = product.array
                return product.output + probes[i]

            values = [(others | marked)[i] for i in range(len(leaves))]
            (loss,) = evaluate(values, add_probe)
            return loss, arrays

        return jax.grad(loss_at, (0, 1), has_aux=True)(others, probes)

    (gradients, slopes), arrays = jax.vmap(of_one)(args)
    parts = [tasks.gram(gradients)] if gradients else []
    for i, product in chosen.items():
        rows = _inner_products(arrays[i], product.summed)
        rows *= _inner_products(slopes[i], product.made)
        axes = [axis for axis in range(rows.ndim) if axis % (rows.ndim // 2)]
        parts.append(rows.sum(axis=axes).real)
    return tasks.sum_leaves(parts)


def _inner_products(x, axes):
    """Those of all rows of all tasks, shape ``(T, *rows, T, *rows)``."""
    return tasks.contract(x, x, tuple(1 + axis for axis in axes))


def _choose(evaluate, leaves, num_tasks):
    """The products of leaves that are used once, where rows are the cheaper way."""
    uses: dict[int, list[_Product | None]] = {i: [] for i in range(len(leaves))}

    def keep(i, product):
        uses[i].append(product)
        return product and product.output

    # For its shapes alone: nothing that it computes is used.
    outputs = evaluate([_Leaf(i, x) for i, x in enumerate(leaves)], keep)
    once = {i: found[0] for i, found in uses.items() if len(found) == 1}
    once |= {x.number: None for x in outputs if isinstance(x, _Leaf)}
    return {i: x for i, x in once.items() if x and x.is_cheap(num_tasks)}


def _evaluate(jaxpr, consts, values, use):
    """Results of a program, with a say in what becomes of its leaves.

    Args:
      jaxpr: the program.
      consts: what it closes over.
      values: its arguments, some of them leaves.
      use: maps the number of a leaf and the product that it is used in to what takes
        the place of the output; for any other use the product is ``None``.
    """
    env = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *values]))
    read = lambda x: x.val if isinstance(x, Literal) else env[x]
    for eqn in jaxpr.eqns:
        inputs = [read(x) for x in eqn.invars]
        leaves = [x for x in inputs if isinstance(x, _Leaf)]
        name = eqn.primitive.name
        if leaves and name in ("jit", "pjit"):
            inner = eqn.params["jaxpr"]
            outputs = _evaluate(inner.jaxpr, inner.consts, inputs, use)
        else:
            outputs = _run(jaxpr, eqn, inputs)
            alike = len(leaves) == len(outputs) == 1 and _are_alike(*leaves, *outputs)
            if alike and name in _SAME_ENTRIES:
                outputs = [_Leaf(leaves[0].number, *outputs)]
            elif alike and name == "dot_general" and _is_of_one_pair(eqn):
                outputs = [use(leaves[0].number, _product(eqn, inputs, *outputs))]
            else:
                for leaf in leaves:
                    use(leaf.number, None)
        env.update(zip(eqn.outvars, outputs))
    return [read(x) for x in jaxpr.outvars]


def _run(jaxpr, eqn, inputs):
    """The outputs of one equation of a program."""
    arrays = {
        variable: x.value if isinstance(x, _Leaf) else x
        for variable, x in zip(eqn.invars, inputs)
        if not isinstance(variable, Literal)
    }
    alone = jaxpr.replace(
        constvars=[], invars=[*arrays], outvars=eqn.outvars, eqns=[eqn]
    )
    return jax.core.eval_jaxpr(alone, (), *arrays.values())


def _are_alike(leaf, output):
    """Whether both are real numbers, or both complex ones."""
    kinds = jnp.floating, jnp.complexfloating
    dtypes = leaf.value.dtype, output.dtype
    return any(all(jnp.issubdtype(x, kind) for x in dtypes) for kind in kinds)


def _is_of_one_pair(eqn):
    """Whether a product is one, and not many side by side."""
    _, batched = eqn.params["dimension_numbers"]
    return batched == ((), ())


def _product(eqn, inputs, output):
    side = int(not isinstance(inputs[0], _Leaf))
    summed = eqn.params["dimension_numbers"][0][1 - side]
    array = inputs[1 - side]
    count = array.ndim - len(summed)  # Of rows' axes, first or last of the output.
    made = range(count, output.ndim) if side else range(output.ndim - count)
    return _Product(array, output, summed, tuple(made))
