"""Errors name what is wrong and the way out."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import optax_mtl
from optax_mtl import upgrad, value_and_grad, value_and_task_grads

PARAMS = {"trunk": np.ones((4, 1), np.float32), "heads": np.ones(3, np.float32)}
T = 3
UPDATES = jax.tree.map(lambda p: np.ones((T, *p.shape), np.float32), PARAMS)
CHAIN = optax.chain(upgrad(), optax.sgd(0.1))


def vector_fn(params):
    return params["heads"] * params["trunk"].sum()


def pair_fn(params, *_):
    losses = {"a": params["heads"].sum(), "b": params["trunk"].sum()}
    return losses, {"accuracy": losses["a"]}


def dict_fn(params, *_):
    return pair_fn(params)[0]


def update(tx):
    return tx.update(UPDATES, tx.init(PARAMS), PARAMS)


def resolve(tx, losses_fn=vector_fn, **options):
    fn = value_and_grad(losses_fn, tx, **options)
    return jax.eval_shape(fn, PARAMS, fn.init(PARAMS))


def at_features(trunk_fn, heads_fn, method, state, **options):
    fn = optax_mtl.value_and_grad_at_features(trunk_fn, heads_fn, method, **options)
    return jax.eval_shape(fn, PARAMS, state)


def accumulate(losses_fn, **options):
    fn = optax_mtl.accumulate_task_grads(losses_fn, 2, **options)
    return jax.eval_shape(fn, PARAMS, np.ones(4))


by_path = lambda path: path
labels = {"trunk": "on", "heads": "on"}
own_trunk = lambda p: p["trunk"]
own_heads = lambda p, z: p["heads"] * z.sum()

MESSAGES = {
    "per_group in Gram mode": (
        lambda: resolve(optax_mtl.per_group(upgrad(), by_path), mode="gram"),
        "per_group measures one Gram matrix for each group.*mode='stacked'",
    ),
    "per_task in Gram mode": (
        lambda: resolve(
            optax.chain(optax_mtl.per_task(optax.clip(1.0), T), upgrad()),
            mode="leafwise",
        ),
        "per_task reads the task gradients.*mode='stacked'",
    ),
    "apply_if_finite in Gram mode": (
        lambda: resolve(optax_mtl.apply_if_finite(CHAIN, 3), mode="gram"),
        "optax.apply_if_finite after the method.*mode='stacked'",
    ),
    "multi_steps in Gram mode": (
        lambda: resolve(optax_mtl.multi_steps(CHAIN, 2, T), mode="gram"),
        "multi_steps, which accumulates.*mode='stacked'",
    ),
    "partition in Gram mode": (
        lambda: resolve(optax.partition({"on": upgrad()}, labels), mode="gram"),
        "nothing in front of it or around it.*mode='stacked'",
    ),
    "no method in Gram mode": (
        lambda: resolve(optax.identity(), mode="gram"),
        "no method that consumes the task axis",
    ),
    "no method": (
        lambda: resolve(optax.sgd(0.1), mode="stacked"),
        r"params\['heads'\] has shape \(3, 3\), the parameter \(3,\): begin",
    ),
    "a state from elsewhere": (
        lambda: value_and_grad(vector_fn, CHAIN)(PARAMS, optax.adam(1.0).init(PARAMS)),
        r"state\[0\].count.*resolve.init\(params\)",
    ),
    "a state from parameters, at features": (
        lambda: at_features(
            own_trunk, own_heads, optax_mtl.gcond(T), optax_mtl.gcond(T).init(PARAMS)
        ),
        r"resolve.init\(params, \*args\), from the features",
    ),
    "weights of another shape": (
        lambda: update(optax_mtl.from_gram(lambda gram: jnp.ones(5))),
        r"one weight for each of the 3 tasks, shape \(3,\), got weights of shape \(5,",
    ),
    "names as weights": (
        lambda: optax_mtl.linear(["a"]),
        r"preference \['a'\] should be one number, or an array",
    ),
    "no order": (
        lambda: optax_mtl.priority_projection(7),
        r"the order 7 should name each task once.*\[1, 0, 2\]",
    ),
    "conflicts of gradients": (
        lambda: optax_mtl.conflicts(UPDATES),
        r"conflicts takes a Gram matrix.*conflicts\(optax_mtl.gram\(updates\)\)",
    ),
    "cosines of gradients": (
        lambda: optax_mtl.cosine_similarity(UPDATES["trunk"]),
        r"cosine_similarity takes a Gram matrix.*optax_mtl.gram\(updates\)",
    ),
    "Gram matrix with unstacked heads": (
        lambda: optax_mtl.gram(UPDATES | {"heads": jnp.ones(5)}),
        r"optax_mtl.gram\(grads\['trunk'\]\).*optax.partition routes",
    ),
    "a function among the parameters": (
        lambda: value_and_task_grads(vector_fn)(PARAMS | {"act": jax.nn.relu}),
        r"params\['act'\] is.*no array.*eqx.partition.*nnx.split",
    ),
    "text among the gradients": (
        lambda: optax_mtl.gram(UPDATES | {"act": "relu"}),
        r"updates\['act'\] is 'relu', which is no array",
    ),
    "MultiSteps around a chain": (
        lambda: update(optax.MultiSteps(CHAIN, 2).gradient_transformation()),
        "optax_mtl.multi_steps takes the place of",
    ),
    "apply_if_finite of Optax around a chain": (
        lambda: resolve(optax.apply_if_finite(CHAIN, 3), mode="stacked"),
        "Optax's conditional wrappers fail.*optax_mtl.apply_if_finite",
    ),
    "conditionally_transform around a chain": (
        lambda: update(
            optax_mtl.checked(optax.conditionally_transform(CHAIN, lambda step: step))
        ),
        "put them after the method",
    ),
    "two methods": (
        lambda: update(optax.chain(optax_mtl.linear(), upgrad())),
        "one method comes first in optax.chain, and no second",
    ),
    "a pair, stacked": (
        lambda: value_and_task_grads(pair_fn)(PARAMS),
        "say has_aux=True",
    ),
    "a pair, resolved": (lambda: resolve(upgrad(), pair_fn), "say has_aux=True"),
    "a pair, at features": (
        lambda: at_features(own_trunk, pair_fn, upgrad(), ()),
        "say has_aux=True",
    ),
    "a pair, accumulated": (lambda: accumulate(pair_fn), "say has_aux=True"),
    "no pair, stacked": (
        lambda: value_and_task_grads(dict_fn, has_aux=True)(PARAMS),
        "losses_fn should return a pair.*leave has_aux out",
    ),
    "no pair, resolved": (
        lambda: resolve(upgrad(), dict_fn, has_aux=True),
        "losses_fn should return a pair",
    ),
    "no pair, at features": (
        lambda: at_features(own_trunk, pair_fn, upgrad(), (), has_aux=True),
        "trunk_fn should return a pair",
    ),
    "no pair, accumulated": (
        lambda: accumulate(dict_fn, has_aux=True),
        "losses_fn should return a pair",
    ),
    "a mask of text": (
        lambda: value_and_task_grads(vector_fn, shared={"trunk": "x", "heads": 0})(
            PARAMS
        ),
        r"shared is 'x' for params\['trunk'\]; it should be True or False",
    ),
    "a mask of another structure": (
        lambda: value_and_task_grads(vector_fn, shared={"trunk": True})(PARAMS),
        "shared should have the structure of the parameters.*lambda path",
    ),
    "other parameters than those of the gradients": (
        lambda: upgrad().update(UPDATES, (), PARAMS | {"activation": jax.nn.relu}),
        "not those that the gradients were taken of; with Equinox.* eqx.filter",
    ),
    "an optimizer of the weights that was not called": (
        lambda: optax_mtl.famo(T, optimizer=optax.adam),
        "optimizer is <function adam.* expected a gradient transformation: call",
    ),
    "names of the scores, and none of the losses": (
        lambda: optax_mtl.pivrg().update(
            UPDATES, (), losses=np.ones(T), scores={"a": 1.0, "b": 2.0, "c": 3.0}
        ),
        "scores have names, 'a', 'b', 'c', but the losses have none",
    ),
    "a second batch that is not stacked": (
        lambda: optax_mtl.modo(T).update(
            UPDATES, optax_mtl.modo(T).init(PARAMS), PARAMS, second_updates=PARAMS
        ),
        r"expected the gradients of T tasks(.|\n)*about the second_updates",
    ),
    "no parameters for checked": (
        lambda: optax_mtl.checked(CHAIN).update(UPDATES, CHAIN.init(PARAMS)),
        r"update\(updates, state, params\)",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_message(name):
    call, message = MESSAGES[name]
    with pytest.raises((TypeError, ValueError), match=message):
        call()


@pytest.mark.parametrize("name", ["PCGrad", "pc-grad", "NashMTL", "Nash_MTL", "MGDA"])
def test_spelling_of_methods(name):
    meant = {"PCGrad": "pcgrad", "pc-grad": "pcgrad", "MGDA": "mgda"}
    with pytest.raises(ValueError, match=meant.get(name, "nash_mtl")):
        optax_mtl.get(name, 2)
    with pytest.raises(TypeError, match="did you mean 'c'"):
        optax_mtl.get("cagrad", 2, C=0.5)
