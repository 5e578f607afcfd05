"""Multiple-gradient descent near a preference."""

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, base, measures, names, solvers, tasks


@names.by_name("preference")
def fedmgda(
    epsilon: jax.typing.ArrayLike = 0.1,
    *,
    preference: names.PerTask | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""FedMGDA+: the shortest combination of unit gradients near a preference.

    .. math::

      d = \sum_i w_i \frac{g_i}{\|g_i\|}, \quad
      w = \operatorname*{argmin}_{w \ge 0, \sum_i w_i = 1}
      \Big\| \sum_i w_i \frac{g_i}{\|g_i\|} \Big\|^2
      \quad \text{subject to} \quad |w_i - p_i| \le \epsilon.

    With ``epsilon=0`` it is the average of the unit gradients by the preference, with
    ``epsilon=1`` :func:`~optax_mtl.mgda` with the normalisation ``"l2"``, which alone
    conflicts with no task. In between, what a single task can do is bounded, whatever
    its gradient: the tasks of the paper are the clients of federated learning.

    Args:
      epsilon: :math:`\epsilon`, how far a weight may be from its preference. Between 0
        and 1.
      preference: :math:`p`, shape ``(T,)`` or a dict by name, scaled to a sum of 1 over
        the tasks that are present; by default equal shares.

    Returns:
      A gradient transformation that aggregates stacked updates. Its length is 1 at
      most, whatever those of the gradients.

    Raises:
      ValueError: for an ``epsilon`` out of range, and for a negative preference, or one
        of another length than T.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 2, 0, -1], [-2, 1, 1, 0], [0.5, -1, 3, 2]])
      >>> method = optax_mtl.fedmgda(epsilon=0.1)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(4)))
      >>> print(jnp.array_str(update, precision=3))
      [0.019 0.317 0.393 0.038]

    References:
      Hu et al, `FedMGDA+: Federated Learning meets Multi-objective Optimization
      <https://arxiv.org/abs/2006.11489>`_, IEEE TNSE 2022
    """
    arguments.check_range("epsilon", epsilon, "[0, 1]")
    preference = arguments.check_preference(preference)

    def weights_fn(gram):
        shares = arguments.preference_among_present(preference, gram)
        return fedmgda_weights(gram, shares, epsilon)

    return base.from_gram(weights_fn)


def fedmgda_weights(
    gram: jax.Array, preference: jax.Array, epsilon: jax.typing.ArrayLike = 0.1
) -> jax.Array:
    """Weights of :func:`fedmgda`.

    Args:
      gram: Gram matrix of the task gradients, shape ``(T, T)``.
      preference: shape ``(T,)``, of any sum, 0 for tasks that are absent.
      epsilon: how far a weight may be from its preference, between 0 and 1.

    Returns:
      Array of shape ``(T,)``.
    """
    exists = tasks.present(gram)
    near = preference * base.reciprocal(preference.sum())
    bounds = jnp.maximum(near - epsilon, 0), jnp.minimum(near + epsilon, 1)
    cosines = measures.cosine_similarity(gram)
    weights = solvers.simplex_qp(cosines, mask=exists, bounds=bounds)
    return weights / jnp.sqrt(jnp.where(exists, jnp.diagonal(gram), 1))
