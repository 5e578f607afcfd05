"""Adaptive weights of auxiliary losses, as of the adversarial loss of VQGAN."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, names


@names.by_name("weight", of_tasks=["primary"])
def adaptive_weight(
    weight: names.PerTask = 1.0,
    *,
    primary: names.Task = 0,
    max_ratio: jax.typing.ArrayLike = 1e4,
    epsilon: jax.typing.ArrayLike = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adaptive weights: auxiliary gradients as long as the primary one, at first.

    .. math::

      d = g_p + \sum_{i \ne p} w_i \min\Big(
      \frac{\|g_p\|}{\|g_i\| + \epsilon}, r \Big) \, g_i

    VQGAN has one auxiliary loss, the adversarial one, and takes the norms at the last
    layer of the decoder: say so to ``measure`` of :func:`~optax_mtl.value_and_grad`.
    Its ``disc_start``, before which the adversarial loss does not count, is a schedule
    of the weight in :func:`optax.inject_hyperparams`.

    Args:
      weight: :math:`w`, one number, shape ``(T,)`` or a dict by name, where that of the
        primary task is not used. At least 0.
      primary: number or name of the primary task, :math:`p`.
      max_ratio: :math:`r`, the largest ratio of the norms. Positive.
      epsilon: added to the norms of the auxiliary gradients. At least 0.

    Returns:
      A gradient transformation that aggregates stacked updates. Without a primary
      gradient the update is zero.

    Raises:
      ValueError: for a negative weight and, at the first update, for a task that does
        not exist, or for weights of another length than T.

    Examples:
      A step of a GAN: the generator has two losses and an optimizer, the discriminator
      its own.

      >>> import jax, jax.numpy as jnp, optax
      >>> import optax_mtl
      >>> def generate(params, z):
      ...   return jnp.tanh(z @ params["first"]) @ params["last"]
      >>> def generator_losses(params, discriminator, z, x):
      ...   fake = generate(params, z)
      ...   adversarial = -jnp.mean(fake @ discriminator)
      ...   return {"adversarial": adversarial, "rec": jnp.mean(jnp.abs(fake - x))}
      >>> def discriminator_loss(discriminator, params, z, x):
      ...   fake = jax.nn.relu(1 + generate(params, z) @ discriminator)
      ...   return jnp.mean(fake + jax.nn.relu(1 - x @ discriminator))
      >>> resolve = optax_mtl.value_and_grad(
      ...   generator_losses,
      ...   optax_mtl.adaptive_weight(0.8, primary="rec"),
      ...   measure=lambda path: path == "last",
      ...   optimizer=optax.adam(1e-3),
      ... )
      >>> other = optax.adam(1e-3)
      >>> @jax.jit
      ... def step(params, discriminator, state, other_state, z, x):
      ...   losses, updates, state = resolve(params, state, discriminator, z, x)
      ...   params = optax_mtl.apply_updates(params, updates)
      ...   grads = jax.grad(discriminator_loss)(discriminator, params, z, x)
      ...   updates, other_state = other.update(grads, other_state)
      ...   discriminator = optax.apply_updates(discriminator, updates)
      ...   return params, discriminator, state, other_state, losses
      >>> params = {"first": jnp.eye(2), "last": jnp.eye(2)}
      >>> discriminator, z = jnp.array([1.0, -1.0]), jnp.array([[1.0, 0], [0, 2]])
      >>> states = resolve.init(params), other.init(discriminator)
      >>> *states, losses = step(params, discriminator, *states, z, jnp.ones((2, 2)))
      >>> print(f"{losses['rec']:.3f} {losses['adversarial']:.3f}")
      0.569 0.101

    References:
      Esser et al, `Taming Transformers for High-Resolution Image Synthesis
      <https://arxiv.org/abs/2012.09841>`_, CVPR 2021

    .. note::
      The authors' code has ``epsilon=1e-4``, which matters where gradients are about as
      small, and a ``weight`` of 0.8 or 1.
    """
    arguments.check_range("weight", weight, "[0, inf)")
    main = arguments.check_primary(primary)
    arguments.check_range("max_ratio", max_ratio, "(0, inf)")
    arguments.check_range("epsilon", epsilon, "[0, inf)")

    def weights_fn(gram):
        given = arguments.for_each_task("weight", weight, len(gram), gram.dtype)
        return adaptive_weight_weights(gram, given, main, max_ratio, epsilon)

    return base.from_gram(weights_fn)


def adaptive_weight_weights(
    gram: jax.Array,
    weight: jax.typing.ArrayLike = 1.0,
    primary: int = 0,
    max_ratio: jax.typing.ArrayLike = 1e4,
    epsilon: jax.typing.ArrayLike = 0.0,
) -> jax.Array:
    """Weights of :func:`adaptive_weight`, from the Gram matrix, shape ``(T, T)``."""
    arguments.check_primary(primary, len(gram))
    norms = jnp.sqrt(jnp.diagonal(gram))
    ratios = norms[primary] * base.reciprocal(norms + epsilon)
    main = jnp.arange(len(gram)) == primary
    return jnp.where(main, 1, weight * jnp.minimum(ratios, max_ratio))
