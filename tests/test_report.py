"""Conflicts and states that one can read, and trees as before."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

VECTORS = np.array([[3.0, 0], [0, 0], [-1, 1], [0, 2]], np.float32)
GRAM = VECTORS @ VECTORS.T
LOSSES = dict.fromkeys(["task10", "absent", "main", "task2"], 1.0)
NAMES = ("absent", "main", "task10", "task2")  # Sorted, as the gradients are.


def test_print_shows_names_norms_cosines_and_the_worst_pair():
    order = [1, 0, 2, 3]  # So that the second gradient is that of main.
    gram = jnp.asarray(GRAM[order][:, order])
    report = optax_mtl.conflicts(gram, names=LOSSES)
    text = str(report)
    assert report.names == NAMES
    # Pairs of main, task10, task2: cosines -1/sqrt(2), 0, 1/sqrt(2).
    assert "33% of the pairs of 3 tasks conflict" in text
    assert "most opposed: main and task10, cosine -0.71" in text
    assert "without a gradient: absent" in text
    row = next(line for line in text.splitlines() if line.startswith("task10 "))
    assert row.split() == ["task10", "1.41", "0.00", "-0.71", "1.00", "0.71"]
    assert "array" not in repr(report).lower()
    numbered = str(optax_mtl.conflicts(gram))
    assert "most opposed: 1 and 2, cosine -0.71" in numbered
    for losses in (jnp.ones(4), np.ones(4), [1.0, 2.0, 3.0, 4.0]):  # Without names.
        assert optax_mtl.conflicts(gram, names=losses).names == ()
    assert optax_mtl.conflicts(gram, names=np.array(NAMES)).names == NAMES


def test_many_tasks_are_no_wall():
    vectors = (
        np.random.default_rng(0).normal(size=(100, 5)) * np.arange(1, 101)[:, None]
    )
    names = [f"t{i}" for i in range(100)]
    text = str(optax_mtl.conflicts(jnp.asarray(vectors @ vectors.T), names=names))
    norms = np.linalg.norm(vectors, axis=1)
    low, high = norms.argmin(), norms.argmax()
    assert (
        f"norms from {norms[low]:.3g} (t{low}) to {norms[high]:.3g} (t{high})" in text
    )
    assert len(text) < 200


def test_nothing_to_report():
    text = str(optax_mtl.conflicts(jnp.zeros((2, 2)), names=["a", "b"]))
    assert "without a gradient: a, b" in text
    assert "most opposed" not in text
    text = str(optax_mtl.conflicts(jnp.full((2, 2), jnp.nan), names=["a", "b"]))
    assert "nan" in text


def test_the_report_is_a_tree_of_arrays_with_static_names():
    grams = jnp.stack([GRAM, 4 * GRAM])
    traced = []

    @jax.jit
    def look(grams):
        one = optax_mtl.conflicts(grams[0], names=NAMES)
        traced.append(str(one))
        each = lambda gram: optax_mtl.conflicts(gram, names=NAMES)
        _, scanned = jax.lax.scan(lambda _, gram: (None, each(gram)), None, grams)
        return one, jax.vmap(each)(grams), scanned

    one, batched, scanned = look(grams)
    assert all(report.names == NAMES for report in (one, batched, scanned))
    assert [x.shape for x in jax.tree.leaves(one)] == [(4,), (4, 4), (), (), ()]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    fields = [jax.tree_util.keystr(path, simple=True) for path in paths]
    assert fields == ["norms", "cosines", "min_cosine", "conflicting", "alignment"]
    np.testing.assert_allclose(batched.norms[1], 2 * one.norms, rtol=1e-6)
    np.testing.assert_allclose(scanned.norms, batched.norms, rtol=1e-6)
    # Without values, or with those of several steps, the shapes say what there is.
    assert "norms=(4,)" in traced[0]
    assert "norms=(2, 4)" in str(batched)
    last = jax.tree.map(lambda x: x[-1], scanned)
    assert "most opposed: absent and task10" in str(last)


def test_as_many_names_as_tasks():
    with pytest.raises(ValueError, match="there are 2 names, a, b, but the Gram matr"):
        optax_mtl.conflicts(jnp.asarray(GRAM), names=["a", "b"])


@pytest.mark.parametrize("names", [LOSSES.keys(), set(LOSSES), ["a", 2, "c", "d"]])
def test_names_in_no_order_are_refused(names):
    """Those of a dict come as it was written, and a set in any order."""
    with pytest.raises(TypeError, match="hand over the dict of the losses, or a list"):
        optax_mtl.conflicts(jnp.asarray(GRAM), names=names)


def test_states_that_hold_gradients_are_one_line():
    """No numbers of large arrays, whatever else the state is used for as before."""
    rng = np.random.default_rng(0)
    layer = lambda: {"kernel": rng.normal(size=(40, 30)), "bias": rng.normal(size=30)}
    params = {"first": layer(), "last": layer()}
    many = {f"layer{i}": layer() for i in range(30)}
    own = [  # Not Optax's, which `adatask` has.
        name
        for name, row in optax_mtl.METHODS.items()
        if type(row.make(3).init(params)).__module__.startswith("optax_mtl")
    ]
    assert {"gcond", "m_config", "sam_gs", "excess_mtl", "moco", "dwa"} < set(own)
    for name in own:
        state = optax_mtl.get(name, 3).init(params)
        text = repr(state)
        assert len(text) < 600 and text.count("\n") < 4, text
        assert len(repr(optax_mtl.get(name, 3).init(many))) < 600
        assert repr(pickle.loads(pickle.dumps(jax.device_get(state)))) == repr(
            jax.device_get(state)
        )
    state = optax_mtl.gcond(2).init({"w": np.ones((4, 5), np.float32)})
    assert repr(state) == (
        "GCondState(previous={'w': float32[2,4,5]}, norms=[0., 0.],"
        " arbitration=Arbitration(cosines=[[0., 0.], [0., 0.]], coefficients=[[0., 0.],"
        " [0., 0.]], winners=[-1, -1, -1], iterations=0))"
    )
    chain = optax.chain(optax_mtl.upgrad(), optax.adam(0.1))
    text = repr(optax_mtl.multi_steps(chain, 2, 3).init(many))
    assert "acc_grads=<60 arrays, 110,700 numbers, float32>" in text
    assert "ScaleByAdamState(count=0, mu=<60 arrays, 36,900 numbers, float32>" in text


def test_states_without_values_are_shown_by_shape():
    method = optax_mtl.bloop()
    state = method.init(np.ones(2, np.float32))
    assert repr(state) == "BloopState(steps=0, average=[0., 0.])"
    shapes = "BloopState(steps=int32[], average=float32[2])"
    assert repr(jax.eval_shape(lambda: state)) == shapes
    seen = []

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state):
        seen.append(repr(state))
        return state

    step(state)
    assert seen == [shapes]
    assert repr(state) == shapes  # Donated: it is no more.


def test_a_task_that_is_not_finite_is_no_agreement():
    """It is not absent: what it takes part in is not known, the rest is."""
    gram = jnp.array([[1.0, -1, jnp.nan], [-1, 4, jnp.nan], [jnp.nan] * 3])
    report = optax_mtl.conflicts(gram, names=["a", "b", "c"])
    figures = report.min_cosine, report.conflicting, report.alignment
    assert np.isnan(figures).all()
    assert report.cosines[0, 1] == -0.5
    text = str(report)
    assert "nan% of the pairs of 3 tasks conflict; alignment nan" in text
