"""Methods of a user: a good one passes optax_mtl.testing, each broken one is named."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl import testing


class Count(NamedTuple):
    count: jax.Array


def zero_count():
    return Count(jnp.zeros([], jnp.int32))


def quarrels(gram):
    """Tasks count less, the more others they conflict with."""
    cosines = optax_mtl.cosine_similarity(gram)
    return 1 / (1 + jnp.sum(cosines < -1e-6, axis=1))


def of_gram(weights_fn):
    return lambda num_tasks: optax_mtl.from_gram(weights_fn)


def by_hand(update, init=lambda params: optax.EmptyState()):
    """A method written without the library's plumbing."""
    return lambda num_tasks: optax.GradientTransformationExtraArgs(init, update)


def of_tasks(reduce):
    return lambda updates: jax.tree.map(lambda g: reduce(g, axis=0), updates)


def test_a_good_method_passes():
    make = of_gram(quarrels)
    testing.check_contract(make)
    for promise in ("symmetric", "rotates", "scales", "agrees", "ignores_absent"):
        testing.check_promise(promise, make)
    testing.check_scale("sum", make)


def test_a_method_that_reads_losses_passes():
    inverse = lambda losses: jnp.where(losses > 0, 1 / losses, 0)
    make = lambda num_tasks: optax_mtl.from_losses(inverse)
    testing.check_contract(make, reads=["losses"])
    with pytest.raises(AssertionError, match=r"^needs_losses_only_if_it_reads_them: "):
        law = "needs_losses_only_if_it_reads_them"
        testing.check_law(law, of_gram(quarrels), reads=["losses"])


def of_three(num_tasks):
    """Works for three tasks alone, by a constant."""
    return optax_mtl.from_gram(lambda gram: gram @ jnp.ones(3) / jnp.trace(gram))


def counting(updates, state, params=None, **extra_args):
    return of_tasks(jnp.sum)(updates), Count(state.count + 1)


def halving(updates, state, params=None, **extra_args):
    return of_tasks(jnp.sum)(updates), Count(state.count + 0.5)


def only_ours(updates, state, params=None, *, losses=None):
    return of_tasks(jnp.sum)(updates), state


def swallowing(updates, state, params=None, **extra_args):
    return of_tasks(jnp.nansum)(updates), state


def in_float32(updates, state, params=None, **extra_args):
    total = lambda g, axis: jnp.sum(g, axis, jnp.float32)
    return of_tasks(total)(updates), state


def summing(updates, state, params=None, **extra_args):
    return of_tasks(jnp.sum)(updates), state


BROKEN = {  # The method, what it breaks, and what the message tells.
    "NaN for an absent task": (
        of_gram(lambda gram: jnp.diagonal(gram) ** -0.5),
        r"absent_tasks: .*With gradient 1 of 3 zero: the update.* is not finite: \[nan",
    ),
    "a state that becomes a float": (
        by_hand(halving, lambda params: zero_count()),
        r"shapes_and_types: .*the new state\.count is float32\[\], expected int32\[\]",
    ),
    "a state of Python numbers": (
        by_hand(counting, lambda params: Count(0)),
        r"initial_state: .*state\.count = 0 has no fixed dtype",
    ),
    "no extra arguments": (
        by_hand(only_ours),
        r"extra_arguments: .*unexpected keyword argument 'value'",
    ),
    "a state that counts steps without an update": (
        by_hand(counting, lambda params: zero_count()),
        r"non_finite_gradients: .*With nan in gradient 1: the state\.count",
    ),
    "gradients that are not finite left out": (
        by_hand(swallowing),
        r"non_finite_gradients: .*With nan in gradient 1: the update is \[\[",
    ),
    "updates in float32": (
        by_hand(in_float32),
        r"many_tasks_in_low_precision: .*\['b'\]\['c'\] is float32\[4\], expected "
        r"float16\[4\]",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_method_is_named(fault):
    make, message = BROKEN[fault]
    with pytest.raises(AssertionError, match=re.compile(f"^{message}", re.DOTALL)):
        testing.check_contract(make)


def test_gradients_that_nobody_checked_are_named():
    with pytest.raises(AssertionError, match=r"^unstacked_updates: .*Ordinary grad"):
        testing.check_law("unstacked_updates", by_hand(summing))


def test_an_error_of_the_method_itself_names_the_law():
    with pytest.raises(TypeError, match="dot_general") as caught:
        testing.check_law("one_task", of_three)
    assert "While trying the law one_task: one task works." in caught.value.__notes__


def test_an_absolute_epsilon_breaks_the_scale():
    make = of_gram(lambda gram: 1 / jnp.sqrt(jnp.diagonal(gram) + 1e-8))
    testing.check_contract(make)  # It asks for finite updates alone.
    with pytest.raises(AssertionError, match=r"^scales: gradients c times as large"):
        testing.check_promise("scales", make)
    # Its weights are 1 / |g| for g = 1, and 1e4 for |g| = 1e-6.
    gradient = np.eye(4, 6)
    tx = make(4)
    for size, weight in ((1.0, 1.0), (1e-6, 1e4)):
        update, _ = tx.update(jnp.asarray(size * gradient), tx.init(None))
        np.testing.assert_allclose(update[0], weight * size, rtol=1e-4)


def test_an_absolute_epsilon_breaks_the_freedom_of_units():
    inverse = lambda epsilon: lambda gram: 1 / jnp.sqrt(jnp.diagonal(gram) + epsilon)
    testing.check_promise("scale_free", of_gram(inverse(0)))
    with pytest.raises(AssertionError, match=r"^scale_free: .*In units \[.*e-0"):
        testing.check_promise("scale_free", of_gram(inverse(1e-8)))


@pytest.mark.parametrize("promise", testing.PROMISES)
def test_a_broken_promise_is_named(promise):
    """One method that breaks each; the numbers and the gradients come along."""
    alternating = lambda gram: jnp.cos(jnp.arange(len(gram)))
    total = lambda gram: jnp.ones(len(gram))
    unit = lambda gram: jnp.diagonal(gram) ** -0.5
    breaks = {
        "symmetric": of_gram(alternating),
        "rotates": by_hand(lambda g, s, p=None, **kw: (jnp.median(g, axis=0), s)),
        "scales": of_gram(lambda gram: jnp.diagonal(gram)),
        "scale_free": of_gram(total),
        "linear_in_scales": of_gram(lambda gram: jnp.diagonal(gram)),
        "never_conflicts": of_gram(total),
        "stationary": of_gram(total),
        "agrees": of_gram(lambda gram: -total(gram)),
        "ignores_absent": of_gram(unit),
    }
    with pytest.raises(AssertionError, match=f"^{promise}: .* at most 1e-06") as caught:
        testing.check_promise(promise, breaks[promise])
    assert "at step 0 with the gradients\n[[" in str(caught.value)


def test_another_scale_is_named():
    with pytest.raises(AssertionError, match=r"^The mean of equal gradients: .* is 3,"):
        testing.check_scale("mean", of_gram(lambda gram: jnp.ones(len(gram))))


def test_unknown_names_are_refused():
    make = of_gram(quarrels)
    with pytest.raises(ValueError, match=r"law is 'absent'.*absent_tasks"):
        testing.check_law("absent", make)
    with pytest.raises(ValueError, match=r"promise is 'symetric'.*symmetric"):
        testing.check_promise("symetric", make)
    with pytest.raises(ValueError, match="reads is 'grams'"):
        testing.check_contract(make, reads=["grams"])


def test_a_method_where_what_makes_it_is_meant():
    for check in (
        testing.check_contract,
        lambda make: testing.check_promise("symmetric", make),
        lambda make: testing.check_scale("mean", make),
    ):
        with pytest.raises(TypeError, match=r"make is .* it should be a function"):
            check(optax_mtl.upgrad())
