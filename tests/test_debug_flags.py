"""No operation makes a NaN or an infinity on the way to a finite update.

Under ``jax_debug_nans`` and ``jax_debug_infs`` one of them stops an eager step even in
the branch of a ``where`` that is not taken. These flags look at the output of each
operation that is dispatched; here all are looked at in one program for each method.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import DropVar, jaxpr_as_fun

import optax_mtl
from tests.common import losses, params, stacked


def watched(fn):
    """The compiled function, which also says which operations made NaN or infinity."""
    made = []

    def run(*args):
        closed, out = jax.make_jaxpr(fn, return_shape=True)(*args)
        values = [
            (eqn, var)
            for eqn in closed.jaxpr.eqns
            for var in eqn.outvars
            if jnp.issubdtype(var.aval.dtype, jnp.inexact) and type(var) is not DropVar
        ]
        made[:] = [eqn for eqn, _ in values]
        outvars = [*closed.jaxpr.outvars, *(var for _, var in values)]
        debug_info = closed.jaxpr.debug_info._replace(result_paths=None)
        jaxpr = closed.jaxpr.replace(outvars=outvars, debug_info=debug_info)
        results = jaxpr_as_fun(closed.replace(jaxpr=jaxpr))(*jax.tree.leaves(args))
        count = len(closed.jaxpr.outvars)
        outs = jax.tree.unflatten(jax.tree.structure(out), results[:count])
        return outs, jnp.stack([jnp.isfinite(x).all() for x in results[count:]])

    compiled = jax.jit(run)

    def call(*args):
        outs, finite = compiled(*args)
        return outs, [made[i] for i in np.flatnonzero(~np.asarray(finite))]

    return call


VARIANTS = {
    "mgda by losses": lambda: optax_mtl.mgda("loss+"),
    "moco by losses": lambda: optax_mtl.moco(3, normalize="loss"),
    "moco softmax": lambda: optax_mtl.moco(3, lambda_map="softmax"),
    "stch with a nadir": lambda: optax_mtl.stch(3, reference=1.0),
    "stch linear": lambda: optax_mtl.stch(3, objective="linear"),
    "igb with a reference": lambda: optax_mtl.igb(3, reference=1.0),
    "db_mtl without averages": lambda: optax_mtl.db_mtl(3, beta=0.0),
    "energy_gate by tensor": lambda: optax_mtl.energy_gate(3, granularity="tensor"),
    "gcond in zones": lambda: optax_mtl.gcond(3, smooth=False, reference="resolved"),
    "sam_gs by the smallest": lambda: optax_mtl.sam_gs(3, similarity="min"),
    "metabalance enlarging": lambda: optax_mtl.metabalance(3, strategy="enlarge"),
    "krum": lambda: optax_mtl.krum(0, num_selected=1, squared=False),
    "cone": lambda: optax_mtl.priority_projection(mode="cone"),
    "complement": lambda: optax_mtl.priority_projection(mode="always"),
    "pcgrad by losses": lambda: optax_mtl.pcgrad(order="losses", unprojected=0.3),
    "ldc_mtl of logarithms": lambda: optax_mtl.ldc_mtl(3, transform="log"),
    "imtl by the paper": lambda: optax_mtl.imtl(3, strict_paper=True),
    "log_losses": lambda: optax.chain(optax_mtl.log_losses(), optax_mtl.linear()),
    "record_conflicts": lambda: optax.chain(
        optax_mtl.record_conflicts(3, every=2), optax_mtl.cagrad()
    ),
    "recorded_method": lambda: optax_mtl.record_conflicts(3, optax_mtl.famo(3)),
    "reweigh": lambda: optax.chain(
        optax_mtl.reweigh(optax_mtl.famo(3)), optax_mtl.cagrad()
    ),
    "fix_weights": lambda: optax_mtl.fix_weights(optax_mtl.famo(3), [None, 0.1, None]),
    "per_task": lambda: optax.chain(
        optax_mtl.per_task(optax.scale_by_adam(), 3), optax_mtl.linear()
    ),
    "smooth_weights": lambda: optax_mtl.smooth_weights(optax_mtl.dwa(3), 3),
    "update_every": lambda: optax_mtl.update_every(optax_mtl.mgda(), 2, 3),
    "per_group": lambda: optax_mtl.per_group(optax_mtl.gls(), lambda path: path),
    "agreement": lambda: optax_mtl.scale_by_agreement(
        optax_mtl.linear(), measure="cosine", smoothing=0.5
    ),
    "zero_nonfinite": lambda: optax.chain(
        optax_mtl.zero_nonfinite(), optax_mtl.linear()
    ),
    "apply_if_finite": lambda: optax_mtl.apply_if_finite(optax_mtl.linear(), 2),
    "multi_steps": lambda: optax_mtl.multi_steps(optax_mtl.famo(3), 2, 3),
}
EVERY = {name: functools.partial(optax_mtl.get, name, 3) for name in optax_mtl.METHODS}


@pytest.mark.parametrize("name", [*EVERY, *VARIANTS])
def test_makes_neither_nan_nor_infinity(name):
    method = (EVERY | VARIANTS)[name]()
    step = watched(lambda g, s, x: method.update(g, s, params(), losses=x))
    present, absent = np.ones(3), np.array([1, 0, 1])
    series = [[present, absent, 0 * present, present], [0 * present, absent]]
    for shares in [*series, [absent, present]]:
        state = method.init(params())
        for share in shares:
            along = lambda x, share=share: share.reshape(3, *[1] * (x.ndim - 1))
            updates = jax.tree.map(
                lambda x, along=along: np.float32(along(x) * x), stacked(3)
            )
            outs, made = step(updates, state, np.float32(share * losses(3)))
            assert not made, [str(eqn.source_info.traceback) for eqn in made]
            state = outs[1]


def test_watching_sees_what_a_where_hides():
    hidden = lambda x: jnp.where(x > 0, jnp.log(x), 0)
    outs, made = watched(hidden)(jnp.array([0.0, 1.0]))
    assert [eqn.primitive.name for eqn in made] == ["log"] and not outs.any()
    with jax.debug_infs(True), pytest.raises(FloatingPointError):
        hidden(jnp.array([0.0, 1.0]))


@pytest.mark.parametrize("name", ["famo", "krum", "moco", "stch"])
def test_eager_steps_under_the_flags(name):
    """With the flags themselves, for a method of each kind that they once stopped."""
    method, updates = optax_mtl.get(name, 3), jnp.eye(3)
    with jax.debug_nans(True), jax.debug_infs(True):
        state = method.init(jnp.zeros(3))
        for share in (1, 0):
            update, state = method.update(
                share * updates, state, losses=share * losses(3)
            )
    assert jnp.isfinite(update).all()
