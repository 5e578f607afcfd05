"""The network, and what training asks of it."""

import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from examples.pinn import problems
from examples.pinn.config import Setup
from examples.pinn.problems import PROBLEMS, Points, Problem


class Network(nnx.Module):
    """Layers of tanh, which have all derivatives that an equation may ask for."""

    def __init__(self, problem: Problem, width: int, depth: int, *, rngs: nnx.Rngs):
        self.low, self.high = problem.low, problem.high
        sizes = [2, *[width] * depth, len(problem.outputs)]
        glorot = nnx.initializers.glorot_normal()
        linear = lambda a, b: nnx.Linear(a, b, kernel_init=glorot, rngs=rngs)
        self.layers = nnx.List([linear(a, b) for a, b in itertools.pairwise(sizes)])

    def __call__(self, points: jax.Array) -> jax.Array:
        """Outputs at points of shape `(n, 2)`, shape `(n, outputs)`."""
        low, high = jnp.array([self.low]), jnp.array([self.high])
        x = 2 * (points - low) / (high - low) - 1  # From -1 to 1.
        *hidden, last = self.layers
        for layer in hidden:
            x = jnp.tanh(layer(x))
        return last(x)


class Functions(NamedTuple):
    """A problem as pure functions of the network's parameters."""

    init: Callable[[jax.Array], Any]  # From a key to parameters.
    draw: Callable[[jax.Array, jax.Array], Points]  # From a key and the step.
    losses: Callable[[Any, Points], dict[str, jax.Array]]
    predict: Callable[[Any, jax.Array], jax.Array]  # Outputs at points.
    optimizer: Callable[[Any], optax.GradientTransformation]  # From a learning rate.


def make(config: Setup) -> Functions:
    """The functions of a training run or a race."""
    problem = PROBLEMS[config.problem]
    size = config.width, config.depth
    build = lambda key: Network(problem, *size, rngs=nnx.Rngs(key))
    graph = nnx.graphdef(build(jax.random.key(0)))
    network = lambda params: nnx.merge(graph, params)
    counts = config.points, config.side_points

    def draw(key, step):
        return problems.draw(problem, jax.random.fold_in(key, step), *counts)

    def optimizer(learning_rate):
        return optax.adam(optax.cosine_decay_schedule(learning_rate, config.steps))

    return Functions(
        init=lambda key: nnx.as_pure(nnx.state(build(key))),
        draw=draw,
        losses=lambda params, points: problem.losses(network(params), points),
        predict=lambda params, points: network(params)(points),
        optimizer=optimizer,
    )


def errors(
    config: Setup, functions: Functions, points: np.ndarray
) -> Callable[[Any], dict[str, jax.Array]]:
    """Function of the parameters to the relative error of each output at points."""
    problem = PROBLEMS[config.problem]
    known = np.asarray(problem.solution(points), np.float32)

    def evaluate(params):
        found = functions.predict(params, jnp.asarray(points, jnp.float32))
        values = problems.relative_errors(found, known)
        return {f"error_{name}": x for name, x in zip(problem.outputs, values)}

    return evaluate
