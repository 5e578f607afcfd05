"""Figures show the numbers that they are given."""

import matplotlib
import numpy as np
import pytest

from optax_mtl import plots

matplotlib.use("Agg")
from matplotlib import pyplot

RNG = np.random.default_rng(0)
NAMES = ["depth", "labels", "normals"]


@pytest.fixture(autouse=True)
def _close():
    yield
    pyplot.close("all")


def cosines_over_time(steps=20, num_tasks=3):
    matrices = RNG.uniform(-1, 1, size=(steps, num_tasks, num_tasks))
    matrices = (matrices + matrices.swapaxes(1, 2)) / 2
    matrices[:, range(num_tasks), range(num_tasks)] = 1
    return matrices


def labels(axis):
    return [text.get_text() for text in axis.get_ticklabels()]


def test_cosines():
    matrix = cosines_over_time(1)[0]
    ax = plots.cosines(matrix, NAMES)
    np.testing.assert_array_equal(ax.images[0].get_array(), matrix)
    assert labels(ax.xaxis) == labels(ax.yaxis) == NAMES
    assert [x.get_text() for x in ax.texts] == [f"{x:.2f}" for x in matrix.ravel()]
    assert not plots.cosines(matrix, numbers=False).texts


def test_groups():
    matrices = cosines_over_time(4)
    ax = plots.groups(matrices, ["a", "b", "c", "d"], NAMES)
    shown = ax.images[0].get_array()
    np.testing.assert_array_equal(shown[:, 1], matrices[:, 0, 2])
    assert labels(ax.xaxis) == ["depth, labels", "depth, normals", "labels, normals"]
    assert labels(ax.yaxis) == ["a", "b", "c", "d"]


def test_conflict_of_few_tasks_and_of_many():
    matrices, steps = cosines_over_time(), np.arange(20) * 10
    ax = plots.conflict(matrices, steps, NAMES)
    lines = {line.get_label(): line.get_xydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["labels, normals"][:, 1], matrices[:, 1, 2])
    np.testing.assert_array_equal(lines["labels, normals"][:, 0], steps)
    many = cosines_over_time(num_tasks=6)
    ax = plots.conflict(many)
    lines = {line.get_label(): line.get_ydata() for line in ax.lines}
    np.testing.assert_array_equal(lines["most opposed"], many.min(axis=(1, 2)))
    assert len(lines) == 3


def test_weights_and_losses():
    values = RNG.uniform(0.01, 10, size=(4, 20, 3))
    ax = plots.weights(values[0], names=NAMES)
    shown = [line.get_ydata() for line in ax.lines]
    np.testing.assert_array_equal(np.transpose(shown), values[0])
    assert ax.get_yscale() == "log"
    ax = plots.losses(values, names=NAMES)
    shown = [line.get_ydata() for line in ax.lines]
    np.testing.assert_allclose(np.transpose(shown), values.mean(axis=0))
    assert len(ax.collections) == 3  # Bands.
    assert not plots.losses(values[0]).collections


def test_trade_off():
    """Of the static weightings (1, 3), (2, 2), (3, 1) and (4, 4) the last is beaten."""
    static = np.array([[3, 1], [1, 3], [4, 4], [2, 2]])
    points = RNG.uniform(1, 2, size=(2, 5, 2))
    ax = plots.trade_off(points, ["sum", "mgda"], ["x", "y"], static)
    front = ax.lines[1].get_xydata()
    np.testing.assert_array_equal(front, [[1, 3], [2, 2], [3, 1]])
    assert ax.get_xlabel() == "x"
    more_is_better = plots.trade_off(points, ["a", "b"], static=static, signs=(-1, -1))
    np.testing.assert_array_equal(more_is_better.lines[1].get_xydata(), [[4, 4]])


def test_paths_on_a_landscape():
    walks = np.cumsum(RNG.normal(size=(2, 30, 2)), axis=1)
    given = pyplot.subplots()[1]
    ax = plots.paths(lambda x: x**2, walks, extent=(-5, 5, -4, 4), ax=given)
    assert ax is given and len(ax.lines) == 6
    np.testing.assert_allclose(ax.lines[3].get_xydata(), walks[1])


@pytest.mark.parametrize("draw", [plots.cosines, plots.weights])
def test_names_of_another_number_of_tasks(draw):
    with pytest.raises(ValueError, match="there are 2 names for 3 tasks"):
        draw(np.eye(3), names=["a", "b"])
