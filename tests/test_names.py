"""Options by the names of the tasks, in every row, mode and wrapper."""

import collections
import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl

# Listed in another order than sorted, which is that of the gradients.
LISTED = ["task2", "main", "task10"]
SORTED = ["main", "task10", "task2"]
VALUES = [0.5, 0.25, 0.75]
# Options with which a method reads what is named, and what it does not read then.
VARIANTS = {
    "moco": [({"normalize": "loss"}, None)],
    "mgda": [({"normalization": "loss"}, None)],
    "stch": [({"objective": "linear"}, "min_losses"), ({}, "preference")],
}
FORMS = ["tutorial", "regression", "classification"]


def options_of(name):
    """Options of a method that may hold names, by name and by number."""
    factory = getattr(optax_mtl, name)
    found = {}
    for option, parameter in inspect.signature(factory).parameters.items():
        annotation = str(parameter.annotation)
        if "Mapping" in annotation:
            values = FORMS if option == "form" else VALUES
            named = dict(zip(LISTED, values))
            found[option] = named, [named[key] for key in SORTED]
        elif option == "primary":
            found[option] = "task10", 1
        elif option == "order" and "Sequence" in annotation:
            found[option] = LISTED, [2, 0, 1]
    return found


NAMED = [name for name in optax_mtl.METHODS if options_of(name)]


def losses_fn(x):
    """Losses of three tasks, one of them below 0.25 nowhere."""
    return {
        "task2": 1 + (x**2).sum(),
        "task10": 2 + (3 * x**2).sum(),
        "main": 3 + ((x - 1) ** 2).sum(),
    }


X = np.array([0.5, -1.0, 2.0], np.float32)


def stacked_step(method, losses_fn=losses_fn):
    def step(x):
        losses, updates = optax_mtl.value_and_task_grads(losses_fn)(x)
        return method.update(updates, method.init(x), x, losses=losses)

    return step


def in_mode(method, mode):
    resolve = optax_mtl.value_and_grad(losses_fn, method, mode=mode)
    return lambda x: resolve(x, resolve.init(x))


def numbered_late(make):
    """The method made with numbers, at each update, as one with names is.

    Constants then come in the same order into the traced program.
    """
    update = lambda *args, **kwargs: make().update(*args, **kwargs)
    return optax.GradientTransformationExtraArgs(make().init, update)


def program(fn, *args):
    """The traced program and its constants: equal ones have equal results."""
    closed = jax.make_jaxpr(fn)(*args)
    text = re.sub(r"0x[0-9a-f]+", "", str(closed))
    return text, [np.asarray(c).tolist() for c in closed.consts]


def test_every_option_for_tasks_takes_names():
    """All that say that they have one value for each task, or number tasks."""
    known = {(name, option) for name in NAMED for option in options_of(name)}
    for name in optax_mtl.METHODS:
        factory = getattr(optax_mtl, name)
        for option in inspect.signature(factory).parameters:
            entry = re.search(
                rf"^  {option}: (?:.+\n)+?(?=  \w+: |\n)",
                inspect.cleandoc(factory.__doc__),
                re.MULTILINE,
            )
            if entry and re.search(r"shape\s+``\(T,\)``", entry[0]):
                assert (name, option) in known, (name, option)
    assert len(known) > 40


@pytest.mark.parametrize(
    ("name", "fixed", "unread"),
    [(n, *variant) for n in NAMED for variant in VARIANTS.get(n, [({}, None)])],
)
def test_names_mean_the_numbers_of_their_tasks(name, fixed, unread):
    options = options_of(name)
    options.pop(unread, None)
    make = lambda which: optax_mtl.get(
        name, 3, **fixed, **{option: pair[which] for option, pair in options.items()}
    )
    steps = [stacked_step]
    if "gradients" not in optax_mtl.METHODS[name].reads:
        steps += [lambda m: in_mode(m, "leafwise"), lambda m: in_mode(m, "gram")]
    for step in steps:
        expected = program(step(numbered_late(lambda: make(1))), X)
        assert program(step(make(0)), X) == expected
    # The comparison sees the order.
    for option, (named, _) in options.items():
        if isinstance(named, dict):
            others = {key: pair[1] for key, pair in options.items()}
            listed = fixed | others | {option: list(named.values())}
            late = numbered_late(lambda kw=listed: optax_mtl.get(name, 3, **kw))
            assert program(step(late), X) != expected, option


def test_the_named_task_is_the_one_that_is_trained():
    """What the gradients of the named losses are, by hand."""
    losses_fn = lambda x: {"main": x[0] - x[1], "aux": x[0] + 2 * x[1]}
    x = jnp.zeros(2)
    methods = {
        "linear": optax_mtl.linear({"main": 1.0, "aux": 0.0}),
        "barrier": optax_mtl.dynamic_barrier(primary="main"),
        "ordered": optax_mtl.priority_projection(["main", "aux"]),
    }
    steps = {name: stacked_step(m, losses_fn) for name, m in methods.items()}
    out = jax.jit(lambda x: {name: step(x)[0] for name, step in steps.items()})(x)
    main, aux = np.array([1.0, -1.0]), np.array([1.0, 2.0])
    np.testing.assert_allclose(out["linear"], main)
    # The secondary gradient without its part along the primary one, which opposes it.
    projected = aux - main * (aux @ main) / (main @ main)
    np.testing.assert_allclose(out["ordered"], main + projected, rtol=1e-6)
    # Dynamic barrier: aux + lambda main, lambda = 1 - <aux, main> / |main|^2.
    factor = 1 - (aux @ main) / (main @ main)
    np.testing.assert_allclose(out["barrier"], aux + factor * main, rtol=1e-6)


def test_renaming_a_loss_changes_nothing():
    """The other order of the gradients, the same update."""

    def update_of(method, names):
        fn = lambda x: dict(zip(names, ((x**2).sum(), x.sum())))
        return stacked_step(method, fn)

    updates = {}
    for names in (["a", "b"], ["z", "b"]):
        weights = dict(zip(names, [1.0, 0.25]))
        methods = [
            optax_mtl.linear(weights),
            optax_mtl.cagrad(preference=weights),
            optax_mtl.pcd(2, primary=names[0], tau=weights),
            optax_mtl.gls(min_losses=weights),
        ]
        steps = [update_of(method, names) for method in methods]
        fn = lambda x, steps=steps: [step(x)[0] for step in steps]
        updates[names[0]] = jax.jit(fn)(X)
    for one, other in zip(updates["a"], updates["z"]):
        np.testing.assert_allclose(one, other, rtol=1e-5)


WEIGHTS = dict(zip(LISTED, VALUES))
NUMBERS = [WEIGHTS[name] for name in SORTED]
WRAPPERS = {
    "chain": lambda method: optax.chain(method, optax.adam(0.1)),
    "checked": optax_mtl.checked,
    "zero_nonfinite": optax_mtl.zero_nonfinite,
    "apply_if_finite": lambda method: optax_mtl.apply_if_finite(method, 3),
    "fix_weights": lambda method: optax_mtl.fix_weights(method, {LISTED[0]: 2.0}),
    "reweigh": lambda method: optax.chain(optax_mtl.reweigh(method), optax_mtl.mgda()),
    "record_conflicts": lambda method: optax_mtl.record_conflicts(3, method),
    "smooth_weights": lambda method: optax_mtl.smooth_weights(method, 3),
    "update_every": lambda method: optax_mtl.update_every(method, 2, 3),
    "per_group": lambda method: optax_mtl.per_group(method, "all"),
    "scale_by_agreement": optax_mtl.scale_by_agreement,
    "multi_steps": lambda method: optax_mtl.multi_steps(method, 2, 3),
    "partition": lambda method: optax.partition({"all": method}, "all"),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_names_reach_the_method_inside(wrapper):
    wrap = WRAPPERS[wrapper]
    named, numbered = (
        program(stacked_step(wrap(method)), X)
        for method in (
            optax_mtl.cagrad(preference=WEIGHTS),
            numbered_late(lambda: optax_mtl.cagrad(preference=NUMBERS)),
        )
    )
    assert named == numbered


def test_names_reach_the_method_from_every_way_of_getting_gradients():
    batch = np.ones((6, 3), np.float32)

    def resolved(method):
        at_features = optax_mtl.value_and_grad_at_features(
            lambda x, b: x * b.mean(0), lambda x, z, b: losses_fn(z), method
        )
        grads_of = lambda one: optax_mtl.accumulate_task_grads(
            lambda x, b: losses_fn(x * b.mean(0)), 3, one_task_each=one
        )
        in_turn = optax_mtl.multi_steps(method, 3, 3, one_task_each=True)

        def fn(x):
            out = [at_features(x, at_features.init(x, batch), batch)]
            for one_task_each in (False, True):
                losses, updates = grads_of(one_task_each)(x, batch)
                out.append(method.update(updates, method.init(x), x, losses=losses))
            losses = losses_fn(x)
            return out, in_turn.update(x, in_turn.init(x), x, losses=losses)

        return fn

    named, numbered = (
        program(resolved(method), X)
        for method in (
            optax_mtl.linear(WEIGHTS),
            numbered_late(lambda: optax_mtl.linear(NUMBERS)),
        )
    )
    assert named == numbered


def test_values_by_name_may_be_traced_and_other_options_injected():
    def fn(x, value):
        weights = WEIGHTS | {"main": value}
        return stacked_step(optax_mtl.linear(weights))(x)[0]

    slope = jax.jit(jax.jacfwd(fn, 1))(X, jnp.float32(0.5))
    np.testing.assert_allclose(slope, 2 * (X - 1), rtol=1e-6)  # The gradient of main.
    inject = optax.inject_hyperparams(optax_mtl.cagrad)
    schedule = optax.linear_schedule(0.1, 0.2, 3)
    named, numbered = (
        program(stacked_step(inject(c=schedule, preference=p)), X)
        for p in (WEIGHTS, NUMBERS)
    )
    assert named == numbered


def test_wrong_names_are_refused_with_the_remedy():
    updates = jnp.eye(3)
    losses = dict.fromkeys(SORTED, 1.0)
    cases = [
        (optax_mtl.linear(WEIGHTS), jnp.ones(3), "hand them on as a dict of scalars"),
        (optax_mtl.linear(WEIGHTS), None, r"losses=\{'task2': \.\.\., 'main': \.\.\."),
        (optax_mtl.dynamic_barrier(primary="main"), [1.0, 1.0, 1.0], "have no names"),
        (optax_mtl.dynamic_barrier(primary="mian"), losses, "did you mean 'main'"),
        (optax_mtl.bloop(primary="x"), losses, "tasks are 'main', 'task10', 'task2'$"),
        (optax_mtl.linear({"main": 1.0}), losses, "leaves out 'task10', 'task2'"),
        (optax_mtl.gls(min_losses={}), losses, "min_losses leaves out 'main'"),
        (
            optax_mtl.priority_projection(["main", "task2"]),
            losses,
            "order leaves out 'task10'",
        ),
        (optax_mtl.linear(WEIGHTS), {**losses, "d": 1.0}, "losses of 4 tasks"),
        (optax_mtl.bloop(primary="d"), {**losses, "d": 1.0}, "but gradients of 3"),
    ]
    for method, handed, message in cases:
        state = method.init(jnp.zeros(3))
        with pytest.raises((TypeError, ValueError), match=message):
            method.update(updates, state, losses=handed)
    with pytest.raises(ValueError, match="should name each task once"):
        optax_mtl.priority_projection(["main", "main"])
    with pytest.raises(ValueError, match="preference"):
        optax_mtl.linear({"main": -1.0, "aux": 1.0})  # Values, before any update.
    with pytest.raises(TypeError, match="dict of one for each name of a task"):
        optax_mtl.cagrad(preference=["main", "aux"])
    with pytest.raises(TypeError, match="hand them on as a dict of scalars"):
        optax_mtl.check(optax_mtl.linear(WEIGHTS), jnp.zeros(3), 3)
    optax_mtl.check(optax_mtl.linear(WEIGHTS), jnp.zeros(3), 3, losses=losses)


def test_names_follow_the_order_in_which_jax_lists_the_losses():
    ordered = collections.OrderedDict(z=1.0, a=2.0)  # Kept by JAX as it is.
    nested = {"b": {"y": 1.0, "x": 2.0}, "a": 3.0}
    for losses in (ordered, nested, dict.fromkeys(LISTED, 0.0)):
        names = optax_mtl.tasks.names_of(losses)
        by_name = dict(zip(names, jax.tree.leaves(losses)))
        method = optax_mtl.linear({name: value + 1 for name, value in by_name.items()})
        updates = jnp.eye(len(names))
        update, _ = method.update(updates, method.init(None), losses=losses)
        np.testing.assert_array_equal(update, np.array(jax.tree.leaves(losses)) + 1)
    assert optax_mtl.tasks.names_of(nested) == ["a", "b/x", "b/y"]
    for losses in (None, np.ones(2), [1.0, 2.0], {"all": np.ones(2)}):
        assert optax_mtl.tasks.names_of(losses) is None


def test_the_first_state_may_be_given_by_name():
    """Named log-variances are those in the order of the losses; another order is not.

    The weights of the first step are exp(-s) / 2 by the paper's formula.
    """
    initial = dict(zip(LISTED, VALUES))
    method = optax_mtl.uncertainty_weighting(3, initial=initial, min_losses=WEIGHTS)
    state = method.init(None)
    np.testing.assert_allclose(state.log_variances, NUMBERS)
    ordered = collections.OrderedDict.fromkeys(LISTED, 3.0)  # JAX keeps this order.
    update, state = method.update(jnp.eye(3), state, losses=dict(ordered))
    np.testing.assert_allclose(update, np.exp(np.negative(NUMBERS)) / 2, rtol=1e-6)
    with pytest.raises(ValueError, match="initial by name counts on losses in the ord"):
        method.update(jnp.eye(3), state, losses=ordered)
    for wrong, message in [
        ({"main": 1.0}, "initial has shape (1,), but there are 3 tasks"),
        (WEIGHTS | {"mian": 1.0}, "shape (4,), but there are 3 tasks"),
        ({"mian": 0.0, "task10": 0.0, "task2": 0.0}, "did you mean 'main'"),
    ]:
        with pytest.raises(ValueError, match=re.escape(message)):
            method = optax_mtl.uncertainty_weighting(3, initial=wrong)
            method.update(jnp.eye(3), method.init(None), losses=dict(ordered))


def test_a_name_used_twice_is_refused():
    nested = {"a": {"b": 1.0}, "a/b": 2.0}  # One name as a path, and as it stands.
    gram = jnp.eye(2)
    cases = [
        (
            lambda: optax_mtl.conflicts(gram, names=("a", "a")),
            "two tasks have the name",
        ),
        (
            lambda: optax_mtl.conflicts(gram, names=nested),
            "two tasks have the name 'a/b",
        ),
        (
            lambda: optax_mtl.linear({"a/b": 1.0}).update(gram, (), losses=nested),
            "two tasks have the name 'a/b', of 'a/b', 'a/b'; rename one",
        ),
        (
            lambda: optax_mtl.priority_projection(("a", "a")),
            r"order is \('a', 'a'\); it should name each task once",
        ),
    ]
    for call, message in cases:
        with pytest.raises(ValueError, match=message):
            call()


def test_labels_are_counted_for_the_tasks_that_have_losses():
    """By the same names: in the order of others they would go to other tasks."""
    losses_fn = lambda x, batch: {"a": x.sum() * batch.sum(), "c": x.sum()}
    count = lambda batch: {"b": 1.0, "c": 2.0}
    accumulate = optax_mtl.accumulate_task_grads(losses_fn, 2, num_labels=count)
    tx = optax_mtl.multi_steps(optax_mtl.linear(), 2, 2)
    message = "num_labels are those of the tasks 'b', 'c', but the losses are those of"
    with pytest.raises(ValueError, match=message):
        accumulate(X, jnp.ones(4))
    with pytest.raises(ValueError, match=message):
        losses = {"a": 1.0, "c": 2.0}
        tx.update(jnp.eye(2), tx.init(X[:2]), losses=losses, num_labels=count(None))


@pytest.mark.parametrize("name", [n for n in NAMED if n != "priority_projection"])
def test_one_number_for_each_task_or_one_for_all(name):
    """Nothing between them, not even one in an array, and no axis more."""
    for option, (named, values) in options_of(name).items():
        if not isinstance(named, dict):
            continue
        for fixed, unread in VARIANTS.get(name, [({}, None)]):
            if option == unread:
                continue
            for wrong in (values[:1], values[:2]):
                with pytest.raises(ValueError, match=f"{option} (has shape|is )"):
                    method = optax_mtl.get(name, 3, **fixed, **{option: wrong})
                    losses = jnp.ones(3) * 4
                    state = jax.eval_shape(method.init, X)
                    step = lambda u, s, m=method, v=losses: m.update(u, s, losses=v)
                    jax.eval_shape(step, jnp.ones((3, 3)), state)


@pytest.mark.parametrize("mode", ["gram", "leafwise", "stacked"])
def test_an_optimizer_gets_the_losses_by_name(mode):
    """What follows the method reads what it would read in a chain."""
    seen = []

    def update(updates, state, params=None, *, losses, **extra_args):
        seen.append(losses)
        return updates, state

    after = optax.GradientTransformationExtraArgs(optax.init_empty_state, update)
    resolve = optax_mtl.value_and_grad(
        losses_fn, optax_mtl.linear(), mode=mode, optimizer=after
    )
    jax.eval_shape(resolve, X, resolve.init(X))
    assert [sorted(losses) for losses in seen] == [SORTED]
