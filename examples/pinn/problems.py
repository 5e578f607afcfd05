"""The equations: their losses, the points to ask them at, and what is known of them.

A network is a function from points, shape `(n, 2)`, to outputs, shape `(n, outputs)`,
each row from its own point; an exact solution written in JAX is one, too.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

Network = Callable[[jax.Array], jax.Array]
Points = dict[str, jax.Array]  # Those inside, and those on each side.


class Problem(NamedTuple):
    """Equations on a rectangle."""

    inputs: tuple[str, str]
    low: tuple[float, float]  # The corners of the rectangle.
    high: tuple[float, float]
    sides: dict[str, tuple[int, float]]  # The input that is fixed, and at what.
    outputs: tuple[str, ...]
    losses: Callable[[Network, Points], dict[str, jax.Array]]
    equations: tuple[str, ...]  # The losses inside, and those on the sides.
    conditions: tuple[str, ...]
    solution: Callable[[Any], Any]  # What is known, of the same form as a network.
    grid: tuple[int, int]  # How many points along each input to compare it on.

    @property
    def tasks(self) -> list[str]:
        """The names of the losses."""
        return sorted(self.equations + self.conditions)

    def weights(self, of_conditions: float) -> dict[str, float]:
        """Of each loss, where those on the sides are weighed by hand."""
        return dict.fromkeys(self.equations, 1.0) | dict.fromkeys(
            self.conditions, of_conditions
        )


def draw(problem: Problem, key: jax.Array, points: int, side_points: int) -> Points:
    """Random points inside the rectangle and on each of its sides."""
    low, high = jnp.array(problem.low), jnp.array(problem.high)
    uniform = lambda key, count: jax.random.uniform(
        key, (count, 2), minval=low[None], maxval=high[None]
    )
    keys = jax.random.split(key, len(problem.sides) + 1)
    found = {"inside": uniform(keys[-1], points)}
    for key, (name, (axis, end)) in zip(keys, problem.sides.items()):
        found[name] = uniform(key, side_points).at[:, axis].set(end)
    return found


def make_grid(problem: Problem) -> np.ndarray:
    """All points of the grid, shape `(rows * columns, 2)`."""
    axes = map(np.linspace, problem.low, problem.high, problem.grid)
    return np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, 2)


def relative_errors(outputs: jax.Array, known: np.ndarray) -> jax.Array:
    """Norm of the error over that of the solution, for each output."""
    norm = lambda x: jnp.linalg.norm(x, axis=0)
    return norm(outputs - known) / norm(known)


def derivatives(
    network: Network, points: jax.Array, axis: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Outputs, their first and their second derivatives along one input.

    Forward over forward: about three forward passes, once the compiler has found what
    is computed twice. A Hessian for each point would take nine, and hold the half that
    no equation here asks for.
    """
    direction = jnp.broadcast_to(jnp.eye(2, dtype=points.dtype)[axis], points.shape)
    along = lambda x: jax.jvp(network, (x,), (direction,))
    (outputs, first), (_, second) = jax.jvp(along, (points,), (direction,))
    return outputs, first, second


def _mean_square(x):
    return jnp.mean(x**2)


def _all_sides(points):
    return jnp.concatenate([x for name, x in points.items() if name != "inside"])


# Burgers: a sine steepens to a shock at x = 0, as thin as the viscosity lets it be.

VISCOSITY = 0.01 / np.pi


def burgers_losses(network: Network, points: Points) -> dict[str, jax.Array]:
    """Of u_t + u u_x = viscosity u_xx, u = 0 at both ends, u = -sin(pi x) at first."""
    inside = points["inside"]
    u, u_x, u_xx = derivatives(network, inside, 0)
    _, u_t, _ = derivatives(network, inside, 1)
    ends = jnp.concatenate([points["left"], points["right"]])
    start = points["start"]
    return {
        "equation": _mean_square(u_t + u * u_x - VISCOSITY * u_xx),
        "boundary": _mean_square(network(ends)),
        "start": _mean_square(network(start) + jnp.sin(np.pi * start[:, :1])),
    }


def burgers_solution(points: np.ndarray, nodes: int = 100) -> np.ndarray:
    r"""By the transformation of Cole and Hopf, in float64.

    .. math::

      u(x, t) = -\frac{\int \sin(\pi y) f(y) e^{-z^2} dz}{\int f(y) e^{-z^2} dz},
      \quad y = x - \sqrt{4 \nu t} \, z, \quad f(y) = e^{-\cos(\pi y) / (2 \pi \nu)},

    both integrals by Gauss and Hermite's quadrature.
    """
    z, weights = np.polynomial.hermite.hermgauss(nodes)
    x, t = np.asarray(points, np.float64).T[..., None]
    y = x - np.sqrt(4 * VISCOSITY * t) * z
    exponent = -np.cos(np.pi * y) / (2 * np.pi * VISCOSITY)
    f = np.exp(exponent - exponent.max(axis=1, keepdims=True)) * weights
    return -np.sum(np.sin(np.pi * y) * f, axis=1, keepdims=True) / f.sum(1)[:, None]


# Kovasznay: the steady flow behind a grid.

REYNOLDS = 40
DECAY = REYNOLDS / 2 - np.sqrt(REYNOLDS**2 / 4 + 4 * np.pi**2)


def kovasznay_losses(network: Network, points: Points) -> dict[str, jax.Array]:
    """Of momentum and mass, velocities on all sides, and pressure where it leaves."""
    inside = points["inside"]
    value, along_x, along_xx = derivatives(network, inside, 0)
    _, along_y, along_yy = derivatives(network, inside, 1)
    u, v, _ = value.T
    (u_x, v_x, p_x), (u_y, v_y, p_y) = along_x.T, along_y.T
    friction_u, friction_v, _ = (along_xx + along_yy).T / REYNOLDS
    sides = _all_sides(points)
    off_u, off_v, _ = (network(sides) - kovasznay_solution(sides)).T
    out = points["right"]
    off_p = (network(out) - kovasznay_solution(out))[:, 2]
    return {
        "momentum_x": _mean_square(u * u_x + v * u_y + p_x - friction_u),
        "momentum_y": _mean_square(u * v_x + v * v_y + p_y - friction_v),
        "mass": _mean_square(u_x + v_y),
        "boundary_u": _mean_square(off_u),
        "boundary_v": _mean_square(off_v),
        "boundary_p": _mean_square(off_p),
    }


def kovasznay_solution(points: jax.Array) -> jax.Array:
    """Velocities u and v, and pressure p."""
    x, y = points[:, 0], 2 * np.pi * points[:, 1]
    wake = jnp.exp(DECAY * x)
    u = 1 - wake * jnp.cos(y)
    v = DECAY / (2 * np.pi) * wake * jnp.sin(y)
    return jnp.stack([u, v, (1 - wake**2) / 2], axis=1)


# Helmholtz: waves of which one direction has four times the frequency.


def helmholtz_losses(network: Network, points: Points) -> dict[str, jax.Array]:
    """Of u_xx + u_yy + u = q, and u = 0 on all sides."""
    inside = points["inside"]
    u, _, u_xx = derivatives(network, inside, 0)
    _, _, u_yy = derivatives(network, inside, 1)
    source = (1 - (1 + 4**2) * np.pi**2) * helmholtz_solution(inside)
    return {
        "equation": _mean_square(u_xx + u_yy + u - source),
        "boundary": _mean_square(network(_all_sides(points))),
    }


def helmholtz_solution(points: jax.Array) -> jax.Array:
    """u = sin(pi x) sin(4 pi y), of Wang et al. 2021, for which q is made."""
    x, y = np.pi * points[:, :1], np.pi * points[:, 1:]
    return jnp.sin(x) * jnp.sin(4 * y)


def _around(low, high):
    """All four sides of a rectangle."""
    names = ("left", low[0]), ("right", high[0]), ("bottom", low[1]), ("top", high[1])
    return {name: (i // 2, end) for i, (name, end) in enumerate(names)}


PROBLEMS = {
    "burgers": Problem(
        inputs=("x", "t"),
        low=(-1.0, 0.0),
        high=(1.0, 1.0),
        sides={"left": (0, -1.0), "right": (0, 1.0), "start": (1, 0.0)},
        outputs=("u",),
        losses=burgers_losses,
        equations=("equation",),
        conditions=("boundary", "start"),
        solution=burgers_solution,
        grid=(257, 101),
    ),
    "kovasznay": Problem(
        inputs=("x", "y"),
        low=(-0.5, -0.5),
        high=(1.0, 1.5),
        sides=_around((-0.5, -0.5), (1.0, 1.5)),
        outputs=("u", "v", "p"),
        losses=kovasznay_losses,
        equations=("momentum_x", "momentum_y", "mass"),
        conditions=("boundary_u", "boundary_v", "boundary_p"),
        solution=kovasznay_solution,
        grid=(101, 101),
    ),
    "helmholtz": Problem(
        inputs=("x", "y"),
        low=(-1.0, -1.0),
        high=(1.0, 1.0),
        sides=_around((-1.0, -1.0), (1.0, 1.0)),
        outputs=("u",),
        losses=helmholtz_losses,
        equations=("equation",),
        conditions=("boundary",),
        solution=helmholtz_solution,
        grid=(101, 101),
    ),
}
