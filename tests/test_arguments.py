"""Every argument of every factory: outside its range, traced, and injected."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

NAN, INF = np.nan, np.inf
# Values outside: of a range, of counts and names. Text and None are no numbers.
NOT_NUMBERS = ["x", None, NAN]
AT_LEAST_0 = [-1, INF, *NOT_NUMBERS]
POSITIVE = [0, -1, INF, *NOT_NUMBERS]
LIMIT = [0, -1, *NOT_NUMBERS]
DECAY = [-0.1, 1, 1.5, *NOT_NUMBERS]
UNIT = [-0.1, 1.5, *NOT_NUMBERS]
RATE = [0, 1.5, *NOT_NUMBERS]
FINITE = [INF, *NOT_NUMBERS]
COUNT = [0, -1, 2.5, True, "2", None]
COUNT_FROM_0 = [-1, 2.5, "2", None]
CHOICE = ["no such thing", 7, [1]]
FLAG = ["yes", None, 2]
KEY = [None, 0.5, "0", True, [1, 2]]
PRIMARY = [-1, 0.5, None, [0]]  # Text is the name of a task.
PREFERENCE = [-1.0, 0.0, [[1.0]], "x"]
optional = lambda values: [v for v in values if v is not None]

METHODS = {
    "adatask": {"num_tasks": COUNT, "b1": DECAY, "b2": DECAY, "eps": AT_LEAST_0},
    "adaptive_weight": {
        "weight": AT_LEAST_0,
        "primary": PRIMARY,
        "max_ratio": POSITIVE,
        "epsilon": AT_LEAST_0,
    },
    "aligned_mtl": {"scale_mode": CHOICE, "preference": PREFERENCE},
    "and_mask": {"threshold": UNIT},
    "bloop": {
        "weight": AT_LEAST_0,
        "step_size": RATE,
        "primary": PRIMARY,
        "subtract": CHOICE,
        "barrier": FLAG,
        "rescale": FLAG,
    },
    "cagrad": {
        "c": AT_LEAST_0,
        "preference": PREFERENCE,
        "rescale": FLAG,
        "clip": FLAG,
    },
    "config": {"length": ["none", 0.5, None], "preference": PREFERENCE},
    "coordinate_median": {},
    "cosine_gating": {"primary": PRIMARY, "weighted": FLAG},
    "cov_weighting": {
        "num_tasks": COUNT,
        "decay": optional(DECAY),
        "min_losses": FINITE,
    },
    "cosmos": {"weight": AT_LEAST_0, "preference": PREFERENCE},
    "dare": {"drop": DECAY, "key": KEY},
    "db_mtl": {
        "num_tasks": COUNT,
        "beta": DECAY,
        "sigma": AT_LEAST_0,
        "min_losses": FINITE,
    },
    "dualproj": {"preference": PREFERENCE, "reg_eps": AT_LEAST_0},
    "dwa": {
        "num_tasks": COUNT,
        "temperature": POSITIVE,
        "window": COUNT,
        "min_losses": FINITE,
    },
    "dynamic_barrier": {"beta": AT_LEAST_0, "primary": PRIMARY},
    "energy_gate": {
        "num_tasks": COUNT,
        "granularity": CHOICE,
        "temperature": POSITIVE,
        "boost": POSITIVE,
        "magnitude": AT_LEAST_0,
        "alignment": AT_LEAST_0,
        "decay": DECAY,
        "energy_decay": DECAY,
    },
    "epo": {
        "preference": PREFERENCE,
        "tolerance": AT_LEAST_0,
        "min_losses": FINITE,
    },
    "excess_mtl": {"num_tasks": COUNT, "eta": AT_LEAST_0, "warmup_steps": COUNT},
    "fairgrad": {
        "alpha": AT_LEAST_0,
        "max_norm": optional(LIMIT),
        "preference": PREFERENCE,
    },
    "famo": {"num_tasks": COUNT, "gamma": AT_LEAST_0, "min_losses": FINITE},
    "fedmgda": {"epsilon": UNIT, "preference": PREFERENCE},
    "ferero": {"num_tasks": COUNT, "preference": PREFERENCE, "gamma": AT_LEAST_0},
    "gcond": {
        "num_tasks": COUNT,
        "thresholds": [(-2, 0, 0), (0, -0.5, 0)],
        "power": POSITIVE,
        "tie_breaking": [(-1, 1), ("a", "b"), None],
        "dominance_window": COUNT_FROM_0,
        "norm_decay": DECAY,
        "norm_cap": optional(LIMIT),
        "max_iters": optional(COUNT_FROM_0),
        "smooth": FLAG,
        "reference": CHOICE,
    },
    "geometric_median": {"num_iters": COUNT_FROM_0},
    "gls": {"min_losses": FINITE},
    "graddrop": {
        "leak": UNIT,
        "keep": [0.5, None],
        "sum_batch": FLAG,
        "key": KEY,
    },
    "go4align": {
        "num_tasks": COUNT,
        "num_groups": COUNT,
        "step_size": AT_LEAST_0,
        "min_losses": FINITE,
    },
    "group_dro": {
        "num_tasks": COUNT,
        "step_size": AT_LEAST_0,
        "preference": PREFERENCE,
    },
    "gradient_agreement_filter": {"threshold": [-0.1, 2.1, *NOT_NUMBERS]},
    "gradnorm": {
        "num_tasks": COUNT,
        "alpha": AT_LEAST_0,
        "initial_losses": optional(FINITE),
        "min_losses": FINITE,
    },
    "gradvac": {"num_tasks": COUNT, "beta": UNIT, "key": KEY},
    "igb": {
        "num_tasks": COUNT,
        "reference": optional(FINITE),
        "warmup_steps": COUNT_FROM_0,
        "window": COUNT,
        "min_losses": FINITE,
    },
    "imgrad": {"c": AT_LEAST_0, "rescale": FLAG},
    "mmpareto": {"gamma": AT_LEAST_0},
    "imtl": {"num_tasks": COUNT, "strict_paper": FLAG, "min_losses": FINITE},
    "imtl_g": {"strict_paper": FLAG},
    "imtl_l": {"num_tasks": COUNT, "min_losses": FINITE},
    "inverse_norm": {"target": CHOICE, "power": AT_LEAST_0},
    "krum": {
        "num_byzantine": optional(COUNT_FROM_0),
        "num_selected": optional(COUNT),
        "squared": FLAG,
    },
    "ldc_mtl": {
        "num_tasks": COUNT,
        "penalty": AT_LEAST_0,
        "transform": CHOICE,
        "initial": FINITE,
        "min_losses": FINITE,
    },
    "linear": {"weights": PREFERENCE},
    "loss_balancer": {
        "num_tasks": COUNT,
        "preference": PREFERENCE,
        "norm": POSITIVE,
        "decay": DECAY,
        "per_example": FLAG,
    },
    "m_config": {"num_tasks": COUNT, "b1": DECAY, "b2": DECAY, "eps": AT_LEAST_0},
    "lr_annealing": {"num_tasks": COUNT, "primary": [*PRIMARY, 2], "decay": DECAY},
    "mean": {},
    "metabalance": {
        "num_tasks": COUNT,
        "relax": UNIT,
        "decay": DECAY,
        "primary": [*PRIMARY, 2],
        "strategy": CHOICE,
    },
    "mgda": {
        "normalization": CHOICE,
        "apply_to": CHOICE,
        "preference": PREFERENCE,
        "min_losses": FINITE,
    },
    "moco": {
        "num_tasks": COUNT,
        "beta": RATE,
        "gamma": AT_LEAST_0,
        "rho": AT_LEAST_0,
        "beta_sigma": AT_LEAST_0,
        "gamma_sigma": AT_LEAST_0,
        "normalize": CHOICE,
        "lambda_map": CHOICE,
        "min_losses": FINITE,
    },
    "modo": {"num_tasks": COUNT, "gamma": AT_LEAST_0, "rho": AT_LEAST_0},
    "nash_mtl": {"max_norm": optional(LIMIT), "preference": PREFERENCE},
    "pareto_mtl": {
        "preference": PREFERENCE,
        "others": optional(AT_LEAST_0),
    },
    "pbi": {"theta": AT_LEAST_0, "preference": PREFERENCE, "reference": FINITE},
    "pcd": {"num_tasks": COUNT, "tau": UNIT, "primary": [*PRIMARY, 2], "decay": DECAY},
    "pcgrad": {"key": KEY, "order": CHOICE, "unprojected": [0.5, *optional(UNIT)]},
    "pivrg": {
        "scores": FINITE,
        "bound": [1, 0.5, INF, *NOT_NUMBERS],
        "min_temperature": POSITIVE,
        "max_norm": optional(LIMIT),
    },
    "priority_projection": {"order": [[0, 0], [1, 2]], "mode": CHOICE},
    "random_weights": {"distribution": CHOICE, "key": KEY},
    "relobralo": {
        "num_tasks": COUNT,
        "alpha": UNIT,
        "temperature": POSITIVE,
        "rho": UNIT,
        "key": KEY,
        "min_losses": FINITE,
    },
    "slaw": {"num_tasks": COUNT, "decay": DECAY},
    "softadapt": {
        "num_tasks": COUNT,
        "variant": CHOICE,
        "beta": FINITE,
        "order": COUNT,
        "min_losses": FINITE,
    },
    "v_rex": {"beta": AT_LEAST_0},
    "sand_mask": {"threshold": UNIT, "k": POSITIVE},
    "sam_gs": {
        "num_tasks": COUNT,
        "b1": DECAY,
        "b2": DECAY,
        "gamma": AT_LEAST_0,
        "similarity": CHOICE,
        "scale_by_num_tasks": FLAG,
    },
    "scale_invariant": {"min_losses": FINITE},
    "sdmgrad": {
        "num_tasks": COUNT,
        "regularization": AT_LEAST_0,
        "preference": PREFERENCE,
    },
    "stch": {
        "num_tasks": COUNT,
        "mu": POSITIVE,
        "objective": CHOICE,
        "reference": optional(FINITE),
        "preference": PREFERENCE,
        "warmup_steps": COUNT_FROM_0,
        "window": COUNT,
        "min_losses": FINITE,
    },
    "ties": {"density": RATE},
    "trimmed_mean": {"num_trimmed": optional(COUNT_FROM_0)},
    "uncertainty_weighting": {
        "num_tasks": COUNT,
        "form": ["no such thing", ["regression"]],
        "initial": FINITE,
        "min_losses": FINITE,
    },
    "upgrad": {"preference": PREFERENCE, "reg_eps": AT_LEAST_0},
    "uw_so": {"temperature": POSITIVE, "min_losses": FINITE},
}
OTHERS = {
    "accumulate_task_grads": {
        "num_microbatches": COUNT,
        "has_aux": FLAG,
        "one_task_each": FLAG,
        "own_data": FLAG,
    },
    "apply_if_finite": {"max_consecutive_errors": COUNT_FROM_0},
    "checked": {},
    "eagc": {"strength": AT_LEAST_0, "anchor": AT_LEAST_0},
    "fix_weights": {"weights": [[INF], [None, NAN], [], *([x] for x in NOT_NUMBERS)]},
    "log_losses": {"min_losses": FINITE},
    "measure_on": {},
    "multi_steps": {"every_k": COUNT, "num_tasks": COUNT, "one_task_each": FLAG},
    "per_group": {},
    "per_task": {"num_tasks": COUNT},
    "record_conflicts": {"num_tasks": COUNT, "decay": UNIT, "every": COUNT},
    "reweigh": {},
    "scale_by_agreement": {
        "measure": CHOICE,
        "rule": CHOICE,
        "smoothing": DECAY,
        "floor": UNIT,
        "power": AT_LEAST_0,
        "threshold": AT_LEAST_0,
        "decay": RATE,
        "growth": [0.5, INF, *NOT_NUMBERS],
        "ceiling": LIMIT,
    },
    "scale_by_lion_lars": {"clip": LIMIT},
    "smooth_weights": {"num_tasks": COUNT, "decay": UNIT},
    "split_tasks": {"num_tasks": COUNT},
    "update_every": {"k": COUNT, "num_tasks": COUNT},
    "value_and_grad": {"has_aux": FLAG, "mode": CHOICE, "own_data": FLAG},
    "value_and_grad_at_features": {"has_aux": FLAG, "sum_batch": FLAG},
    "value_and_task_grads": {"has_aux": FLAG, "sequential": FLAG, "own_data": FLAG},
    "with_sharded_parameters": {},
    "zero_nonfinite": {},
    "sum_tasks": {},
    "mean_tasks": {},
}
# Checked by whom they are handed to, or by their first use with a tree.
UNRESTRICTED = {
    "tx": "a transformation of Optax",
    "method": "a transformation",
    "optimizer": "a transformation of Optax",
    "losses_fn": "a function of the user",
    "trunk_fn": "a function of the user",
    "heads_fn": "a function of the user",
    "num_labels": "a function of the user, checked when called",
    "shared": "a mask, compared with the parameters",
    "sharded": "a mask, compared with the parameters",
    "mask": "a mask, compared with the parameters",
    "measure": "a mask, compared with the parameters",
    "labels": "names of groups, compared with the parameters",
    "z": "features, checked for gradients",
    "axis_name": "the name of an axis, known to JAX",
    "dtype": "known to JAX",
    "accumulator_dtype": "known to JAX",
}
FACTORIES = METHODS | OTHERS
PLACEHOLDERS = {
    "num_tasks": 2,
    "weights": [1.0, None],
    "tx": optax.identity(),
    "method": optax_mtl.linear(),
    "every_k": 2,
    "k": 2,
    "num_microbatches": 2,
    "max_consecutive_errors": 2,
    "labels": "all",
    "mask": True,
    "axis_name": "data",
    "z": np.ones(2),
} | dict.fromkeys(["losses_fn", "trunk_fn", "heads_fn"], lambda x: x)


def parameters(name):
    return inspect.signature(getattr(optax_mtl, name)).parameters


def make(name, **given):
    needed = {
        p.name: PLACEHOLDERS[p.name]
        for p in parameters(name).values()
        if p.default is p.empty
    }
    return getattr(optax_mtl, name)(**(needed | given))


def test_the_tables_name_every_argument():
    """A new argument needs its range here, or a reason why it has none."""
    assert set(METHODS) == set(optax_mtl.METHODS)
    factories = {
        name
        for name, value in vars(optax_mtl).items()
        if inspect.isfunction(value)
        and ("GradientTransformation" in str(inspect.signature(value)))
    }
    # These take functions of weights, or the options of another factory; test_compare
    # has the arguments of compare.
    factories -= {"from_gram", "from_losses", "from_state", "get", "compare"}
    assert factories <= set(FACTORIES)
    for name, ranges in FACTORIES.items():
        known = set(parameters(name))
        assert set(ranges) <= known, name
        assert known - set(ranges) <= set(UNRESTRICTED), name


@pytest.mark.parametrize("name", FACTORIES)
def test_values_outside_the_range_are_refused_by_name(name):
    make(name)
    for argument, values in FACTORIES[name].items():
        names = [argument, "preference"] if argument == "weights" else [argument]
        for value in values:
            try:
                make(name, **{argument: value})
            except (TypeError, ValueError) as error:
                assert any(x in str(error) for x in names), (argument, value, error)
            else:
                raise AssertionError(f"{name}({argument}={value!r}) was taken")


def test_the_range_and_the_value_are_in_the_error():
    with pytest.raises(ValueError, match=r"b1 is 1; it should be in \[0, 1\)"):
        optax_mtl.adatask(2, b1=1)
    with pytest.raises(ValueError, match="k is 0; it should be an integer of at lea"):
        optax_mtl.update_every(optax_mtl.linear(), 0, 2)
    with pytest.raises(ValueError, match="order is 'up'; it should be 'random', 'f"):
        optax_mtl.pcgrad(order="up")


def test_functions_at_the_features():
    z, labelled = jnp.ones((2, 2)), jnp.array([True, False])
    common = {"conceptor": jnp.eye(2), "labelled": labelled}
    state = optax_mtl.EAGCState(jnp.array(0.5))
    anchored = {**common, "weight": jnp.zeros(2), "reference": z}
    calls = [
        (optax_mtl.eagc_weights, (z,), {**common, "state": state}, "decay", DECAY),
        (optax_mtl.eagc_weights, (z,), {**common, "state": state}, "strength", [-1]),
        (optax_mtl.coordinate, (z,), anchored, "anchor", AT_LEAST_0),
        (optax_mtl.coordinate, (z,), anchored, "loss_scale", POSITIVE),
        (optax_mtl.fit_conceptor, (z,), {}, "aperture", AT_LEAST_0),
        (optax_mtl.fit_conceptor, (z,), {}, "relative", FLAG),
        (optax_mtl.from_state, (optax.EmptyState, max), {}, "reads", [["grams"]]),
    ]
    for fn, args, kwargs, argument, values in calls:
        for value in values:
            with pytest.raises((TypeError, ValueError), match=f"{argument} is"):
                fn(*args, **kwargs, **{argument: value})


def test_keys_of_every_kind_are_taken():
    expected = jax.random.key_data(optax_mtl.pcgrad(3).init(None).key)
    for key in (np.int64(3), jnp.array(3), jax.random.key(3)):
        actual = jax.random.key_data(optax_mtl.pcgrad(key).init(None).key)
        np.testing.assert_array_equal(actual, expected)
    optax_mtl.pcgrad(jax.random.key_data(jax.random.key(3))).init(None)


def test_no_tasks_and_text():
    method = optax_mtl.upgrad()
    with pytest.raises(TypeError, match=r"updates\['w'\] is 'ab', which is no array"):
        method.update({"w": "ab"}, method.init(None))
    with pytest.raises(ValueError, match="no task"):
        method.update(jnp.zeros((0, 3)), method.init(None))
    loss_method = optax_mtl.gls()
    updates, state = jnp.ones((2, 3)), loss_method.init(None)
    for losses in ("ab", {"a": "1", "b": 2.0}):
        with pytest.raises(TypeError, match="expected one number for each task"):
            loss_method.update(updates, state, losses=losses)
    grads_fn = optax_mtl.value_and_task_grads(lambda w: jnp.zeros(0) * w.sum())
    with pytest.raises(ValueError, match="losses"):
        grads_fn(jnp.ones(3))


# Of each numeric argument a value that it may have besides its default.
INJECTED = {
    "primary": 1,
    "key": 5,
    "preference": [0.5, 2.0],
    "weights": [0.5, 2.0],
    "initial_losses": 0.7,
    "reference": 0.1,
    "max_norm": 0.5,
    "norm_cap": 0.5,
}


@pytest.mark.parametrize("name", METHODS)
def test_injected_arguments_work_or_name_static_args(name):
    """Each numeric argument varies over the steps, or the error says what to do."""
    factory, known = getattr(optax_mtl, name), parameters(name)
    fixed = {"num_tasks": 2} if "num_tasks" in known else {}
    # Flags and names are never injected; numbers and functions are unless named.
    counts = [k for k, values in METHODS[name].items() if 2.5 in values]
    static = counts + [k for k in known if callable(known[k].default)]
    varying = {
        k: INJECTED.get(k, known[k].default)
        for k, values in METHODS[name].items()
        if k not in static and values is not CHOICE
        and (k in INJECTED or _is_number(known[k].default))
    }  # fmt: skip
    if name == "stch":
        del varying["preference"]  # Which the default objective does not take.
    varying = {k: jnp.asarray(v) if np.ndim(v) else v for k, v in varying.items()}
    updates = np.random.default_rng(0).normal(size=(2, 3)).astype(np.float32)
    losses, params = np.array([0.5, 2], np.float32), np.zeros(3, np.float32)

    def first_update(tx):
        state = tx.init(jnp.asarray(params))
        return jax.jit(
            lambda state: tx.update(updates, state, jnp.asarray(params), losses=losses)
        )(state)[0]

    plain = first_update(factory(**fixed, **varying))
    inject = optax.inject_hyperparams(factory, static_args=static)
    injected = first_update(inject(**fixed, **varying))
    np.testing.assert_allclose(injected, plain, rtol=1e-5, atol=1e-6)
    for argument in static:
        others = [other for other in static if other != argument]
        inject = optax.inject_hyperparams(factory, static_args=others)
        with pytest.raises(TypeError, match=rf'static_args=\("{argument}",\)'):
            inject(**(fixed | dict.fromkeys(counts, 2))).init(jnp.asarray(params))


def _is_number(default):
    return isinstance(default, (int, float)) and not isinstance(default, bool)
