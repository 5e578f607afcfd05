"""Energy-aware gradient coordination for category discovery."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from optax_mtl import arguments, tasks


class EAGCState(NamedTuple):
    """The one running quantity of :func:`eagc_weights`."""

    labelled_energy: jax.Array  # Running mean of the energy of labelled rows, scalar.


def eagc(
    strength: jax.typing.ArrayLike = 0.5,
    anchor: jax.typing.ArrayLike = 0.7,
) -> optax.GradientTransformationExtraArgs:
    r"""Energy-aware gradient coordination (EAGC), as a gradient transformation.

    A model that is to recognise known classes and discover new ones gets gradients
    at the features :math:`z` of labelled and of unlabelled samples, and they entangle.
    EAGC pulls labelled features towards those of a frozen model that was trained on
    the labelled set only (anchor-based alignment), and takes from each unlabelled
    sample's gradient :math:`g_i` a share of its part in the subspace of known
    classes, the larger the more novel the sample looks (energy-based projection):

    .. math::

      g_i \leftarrow g_i - \lambda_p \tau_i \, g_i C \;\text{ (unlabelled)}, \qquad
      g_i \leftarrow g_i + \frac{\lambda_a}{N_l D} (z_i - z_i^{ref})
      \;\text{ (labelled)},

    where :math:`C` is the conceptor of the known classes (:func:`fit_conceptor`) and
    :math:`\tau_i` comes from :func:`eagc_weights`. For parameters this is exactly

    .. math::

      G_{labelled} + G_{unlabelled} - \lambda_p G_{known} + \lambda_a G_{anchor}

    with the four pull-backs that :func:`eagc_pull_backs` makes. The two forms give
    equal gradients; :func:`coordinate` does it with one backward pass in place of
    four, this one lets the four be looked at, clipped or smoothed first.

    Args:
      strength: :math:`\lambda_p`, the share that is projected away. Above 1 the
        gradient may be reversed along known directions; this is allowed. At least 0.
      anchor: :math:`\lambda_a`, the strength of the alignment. At least 0.

    Returns:
      A gradient transformation that turns stacked updates with a leading axis of
      size 4 (labelled, unlabelled, known, anchor) into one update.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> updates = jnp.array([[1.0, 0.0], [0.0, 2.0], [0.0, 1.0], [1.0, 0.0]])
      >>> method = optax_mtl.eagc(strength=0.5, anchor=0.7)
      >>> update, _ = method.update(updates, method.init(jnp.zeros(2)))
      >>> print(update)
      [1.7 1.5]

    References:
      Zheng et al, `The Devil Is in Gradient Entanglement: Energy-Aware Gradient
      Coordinator <https://arxiv.org/abs/2604.14176>`_, CVPR 2026

    .. note::
      Follows the authors' code where the paper's text differs: the alignment is
      divided by the number of labelled rows and of features, the gate is clipped to
      :math:`[0, 1]`, and the labelled energy is a running mean.
    """
    arguments.check_range("strength", strength, "[0, inf)")
    arguments.check_range("anchor", anchor, "[0, inf)")

    def init_fn(params: Any) -> optax.EmptyState:
        del params
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        tasks.check_stacked(updates, params, 4)
        weights = jnp.stack([1.0, 1.0, jnp.negative(strength), anchor])
        return tasks.combine(weights, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def eagc_pull_backs(
    pull_back: Callable[[jax.Array], Any],
    z: jax.Array,
    cotangent: jax.Array,
    *,
    conceptor: jax.Array,
    reference: jax.Array,
    labelled: jax.Array,
    state: EAGCState,
    decay: jax.typing.ArrayLike = 0.95,
    loss_scale: jax.typing.ArrayLike = 1.0,
    axis_name: str | None = None,
) -> tuple[Any, EAGCState]:
    r"""The four parameter gradients that :func:`eagc` combines.

    With :math:`J = \partial z / \partial \theta` linearised once and the cotangent
    :math:`c = \partial L / \partial z`, in this order: :math:`J^T (m c)`,
    :math:`J^T ((1 - m) c)`, :math:`J^T ((1 - m) \tau (c C))` and
    :math:`J^T (m (z - z^{ref})) / (N_l D)`.

    Args:
      pull_back: what ``jax.vjp(trunk, params)`` returned beside ``z``.
      z: features, shape `(n, D)`.
      cotangent: gradient of the total loss with respect to ``z``, shape `(n, D)`.
      conceptor: of the known classes, from :func:`fit_conceptor`, shape `(D, D)`.
      reference: features of the frozen reference model, shape `(n, D)`.
      labelled: which rows are labelled, bools or zeros and ones, shape `(n,)`.
      state: running energy of the labelled rows.
      decay: of the running energy. In [0, 1).
      loss_scale: factor by which the loss, hence ``cotangent``, was multiplied.
        Positive.
      axis_name: axis of devices over which gradients are averaged afterwards.

    Returns:
      The stacked updates, with a leading axis of size 4, and the new state.

    Raises:
      ValueError: for arrays whose shapes do not fit ``z``.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> inputs = jnp.array([[1.0, 0.0], [0.0, 1.0]])
      >>> z, pull_back = jax.vjp(lambda w: inputs @ w, jnp.eye(2))
      >>> updates, state = optax_mtl.eagc_pull_backs(
      ...     pull_back, z, jnp.ones((2, 2)), conceptor=jnp.diag(jnp.array([0.8, 0.2])),
      ...     reference=jnp.zeros((2, 2)), labelled=jnp.array([True, False]),
      ...     state=optax_mtl.EAGCState(jnp.array(0.8)))
      >>> print(jnp.array_str(updates[2], precision=3, suppress_small=True))
      [[0.   0.  ]
       [0.6  0.15]]
    """
    tau, state = eagc_weights(
        z,
        labelled,
        conceptor,
        state,
        strength=1.0,
        decay=decay,
        axis_name=axis_name,
    )
    pull = _anchor_pull(z, reference, labelled, loss_scale, axis_name)
    if cotangent.shape != z.shape:
        raise ValueError(f"cotangent is {cotangent.shape}, but z is {z.shape}")
    mask = labelled.astype(cotangent.dtype)[:, None]
    known = _project(cotangent, tau, conceptor)
    cotangents = jnp.stack([mask * cotangent, (1 - mask) * cotangent, known, pull])
    (updates,) = jax.vmap(pull_back)(cotangents)
    return updates, state


def coordinate(
    z: jax.Array,
    *,
    conceptor: jax.Array,
    weight: jax.Array,
    reference: jax.Array,
    labelled: jax.Array,
    anchor: jax.typing.ArrayLike = 0.7,
    loss_scale: jax.typing.ArrayLike = 1.0,
    axis_name: str | None = None,
) -> jax.Array:
    r"""Identity whose backward pass coordinates gradients as :func:`eagc` does.

    Put it once between the backbone and everything that reads its features. The
    cotangent :math:`g` of the result becomes

    .. math::

      g_i - w_i \, g_i C + \frac{\lambda_a}{N_l D} m_i (z_i - z_i^{ref}).

    The last term is the gradient of ``anchor / 2`` times the mean squared error
    between labelled features and their reference. Nothing else is differentiated.

    Args:
      z: features, shape `(n, D)`.
      conceptor: of the known classes, from :func:`fit_conceptor`, shape `(D, D)`.
      weight: shares to project away, from :func:`eagc_weights`, shape `(n,)`.
      reference: features of the frozen reference model for the same views,
        shape `(n, D)`.
      labelled: which rows are labelled, bools or zeros and ones, shape `(n,)`.
      anchor: :math:`\lambda_a`, the strength of the alignment. At least 0.
      loss_scale: factor by which the loss is multiplied (mixed precision), so that
        dividing the gradients by it gives the alignment its full strength.
      axis_name: axis of devices over which gradients are averaged afterwards
        (under `pmap` and `shard_map`; nothing is needed under sharded `jit`).

    Returns:
      ``z`` itself.

    Examples:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> def loss(z):
      ...     z = optax_mtl.coordinate(
      ...         z, conceptor=jnp.diag(jnp.array([0.8, 0.2])),
      ...         weight=jnp.array([0.0, 0.5]), reference=jnp.zeros((2, 2)),
      ...         labelled=jnp.array([True, False]), anchor=0.5)
      ...     return z.sum()
      >>> print(jnp.array_str(jax.grad(loss)(jnp.ones((2, 2))), precision=3))
      [[1.25 1.25]
       [0.6  0.9 ]]

    References:
      Zheng et al, `The Devil Is in Gradient Entanglement: Energy-Aware Gradient
      Coordinator <https://arxiv.org/abs/2604.14176>`_, CVPR 2026

    .. note::
      A `jax.custom_vjp`, so it has no forward-mode derivative.
    """
    arguments.check_range("anchor", anchor, "[0, inf)")
    _check_features(z, conceptor, labelled=labelled, weight=weight)
    pull = anchor * _anchor_pull(z, reference, labelled, loss_scale, axis_name)
    constants = jax.lax.stop_gradient((conceptor, weight, pull))
    return _coordinate(z, *constants)


@jax.custom_vjp
def _coordinate(z, conceptor, weight, pull):
    del conceptor, weight, pull
    return z


def _coordinate_fwd(z, *constants):
    return z, constants


def _coordinate_bwd(constants, cotangent):
    conceptor, weight, pull = constants
    known = _project(cotangent, weight, conceptor)
    z_bar = cotangent - known + pull.astype(cotangent.dtype)
    return z_bar, *jax.tree.map(jnp.zeros_like, constants)


_coordinate.defvjp(_coordinate_fwd, _coordinate_bwd)


def eagc_weights(
    z: jax.Array,
    labelled: jax.Array,
    conceptor: jax.Array,
    state: EAGCState,
    *,
    strength: jax.typing.ArrayLike = 0.5,
    decay: jax.typing.ArrayLike = 0.95,
    axis_name: str | None = None,
) -> tuple[jax.Array, EAGCState]:
    r"""Share of the known subspace that each row's gradient is to lose.

    .. math::

      \mu \leftarrow \beta \mu + (1 - \beta) \, \mathrm{mean}_{labelled} E(z_i), \quad
      \tau_i = \mathrm{clip}(1 - E(z_i) / (\mu + 10^{-6}), 0, 1), \quad
      w_i = \lambda_p \tau_i (1 - m_i).

    The mean moves before it is used, and stays where it is when no row is labelled.

    Args:
      z: features of the model that is being trained, shape `(n, D)`.
      labelled: which rows are labelled, bools or zeros and ones, shape `(n,)`.
      conceptor: of the known classes, from :func:`fit_conceptor`, shape `(D, D)`.
      state: running energy; start with the mean of :func:`energy_ratio` over the
        reference features of the labelled set.
      strength: :math:`\lambda_p`. At least 0.
      decay: :math:`\beta`. In [0, 1).
      axis_name: axis of devices over which the batch is divided, if any.

    Returns:
      The weights, shape `(n,)`, zero for labelled rows, and the new state.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> weight, state = optax_mtl.eagc_weights(
      ...     jnp.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]),
      ...     jnp.array([True, False, False]), jnp.diag(jnp.array([0.8, 0.2])),
      ...     optax_mtl.EAGCState(jnp.array(0.6)))
      >>> print(jnp.array_str(weight, precision=3))
      [0.    0.336 0.09 ]
      >>> print(f"{state.labelled_energy:.3f}")
      0.610

    References:
      Zheng et al, `The Devil Is in Gradient Entanglement: Energy-Aware Gradient
      Coordinator <https://arxiv.org/abs/2604.14176>`_, CVPR 2026
    """
    arguments.check_range("strength", strength, "[0, inf)")
    arguments.check_range("decay", decay, "[0, 1)")
    _check_features(z, conceptor, labelled=labelled)
    energy = energy_ratio(z, conceptor)
    mask = labelled.astype(energy.dtype)
    total = jnp.where(mask > 0, energy, 0).sum()
    count = mask.sum()
    if axis_name is not None:
        total, count = jax.lax.psum((total, count), axis_name)

    old = state.labelled_energy
    new = decay * old + (1 - decay) * total / jnp.maximum(count, 1)
    # Features that are not finite poison the weights, but not the state.
    moves = (count > 0) & jnp.isfinite(new)
    mean = jnp.where(moves, new, old).astype(old.dtype)

    tau = jnp.clip(1 - energy / (mean + 1e-6), 0, 1)
    weight = jnp.asarray(strength) * tau * (1 - mask)
    return weight, EAGCState(labelled_energy=mean)


def energy_ratio(z: jax.Array, conceptor: jax.Array) -> jax.Array:
    r"""Share of a feature vector's energy in the subspace of known classes.

    .. math:: E(z) = z C z^T / \|z\|^2 \in [0, 1]

    Args:
      z: features, shape `(..., D)`.
      conceptor: of the known classes, from :func:`fit_conceptor`, shape `(D, D)`.

    Returns:
      The energy of each row, shape `(...)`, zero for a zero row. No gradient flows.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> conceptor = jnp.diag(jnp.array([0.8, 0.2]))
      >>> print(optax_mtl.energy_ratio(jnp.array([[1.0, 0.0], [1.0, 1.0]]), conceptor))
      [0.8 0.5]
    """
    _check_conceptor(z, conceptor)
    dtype = jnp.promote_types(z.dtype, jnp.float32)
    z, conceptor = jax.lax.stop_gradient((z.astype(dtype), conceptor.astype(dtype)))
    projected = jnp.matmul(z, conceptor, precision=jax.lax.Precision.HIGHEST)
    norm2 = jnp.sum(z * z, -1)
    energy = jnp.sum(projected * z, -1) / jnp.where(norm2 == 0, 1, norm2)
    return jnp.clip(energy, 0, 1)


def fit_conceptor(
    features: jax.Array | None = None,
    aperture: jax.typing.ArrayLike = 2.0,
    *,
    second_moment: jax.Array | None = None,
    relative: bool = False,
) -> jax.Array:
    r"""Soft projector on the subspace that features occupy.

    .. math:: C = R \, (R + \alpha^{-2} I)^{-1}, \qquad R = Z^T Z / N.

    Symmetric, with eigenvalues in :math:`[0, 1)`. Fit it once, on the features that
    the frozen reference model gives the labelled set, without augmentation.

    Args:
      features: :math:`Z`, neither centred nor normalised, shape `(N, D)`.
      aperture: :math:`\alpha`, at least 0. As it grows, the conceptor becomes the
        projector on the span of the features; at 0 it vanishes.
      second_moment: :math:`R`, in place of ``features``, shape `(D, D)`: for sets
        that do not fit in memory, as the mean of ``Z.T @ Z / N`` over batches.
      relative: divide :math:`R` by its mean diagonal first, so that scaling the
        features changes nothing. The default aperture is meant for features of the
        scale of DINO's; use this for others. (Ours, not the paper's.)

    Returns:
      The conceptor, shape `(D, D)`.

    Raises:
      ValueError: if there are no features, or if they are not finite.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> features = jnp.array([[2.0, 0.0], [0.0, 1.0]])
      >>> print(jnp.array_str(optax_mtl.fit_conceptor(features), precision=3))
      [[0.889 0.   ]
       [0.    0.667]]

    References:
      Jaeger, `Controlling Recurrent Neural Networks by Conceptors
      <https://arxiv.org/abs/1403.3369>`_, 2014
    """
    arguments.check_range("aperture", aperture, "[0, inf)")
    arguments.check_choice("relative", relative, (True, False))
    if (features is None) == (second_moment is None):
        raise ValueError("give either features or second_moment")
    if features is not None:
        if features.ndim != 2 or len(features) == 0:
            raise ValueError(
                f"features has the shape {features.shape}, but must be (N, D) with "
                "N > 0: without a labelled sample there are no known classes. "
                "For no projection at all use jnp.zeros((D, D)) as the conceptor."
            )
        features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
        second_moment = jnp.matmul(
            features.T, features, precision=jax.lax.Precision.HIGHEST
        ) / len(features)
    assert second_moment is not None
    if second_moment.ndim != 2 or second_moment.shape[0] != second_moment.shape[1]:
        raise ValueError(f"second_moment is {second_moment.shape}, but must be (D, D)")
    if not isinstance(second_moment, jax.core.Tracer):
        if not jnp.isfinite(second_moment).all():
            raise ValueError("features (or second_moment) has NaN or infinite entries")

    values, vectors = jnp.linalg.eigh(second_moment)
    values = jnp.maximum(values, 0)  # Rounding can make a zero one negative.
    if relative:
        mean = values.mean()
        values = values / jnp.where(mean == 0, 1, mean)
    # Of s / (s + aperture**-2): the form that is safe at aperture 0.
    scaled = aperture**2 * values
    shares = scaled / (scaled + 1)
    highest = jax.lax.Precision.HIGHEST
    conceptor = jnp.matmul(vectors * shares[None], vectors.T, precision=highest)
    return (conceptor + conceptor.T) / 2  # Symmetric to the last bit.


def _project(cotangent, weight, conceptor):
    """Part of each row in the known subspace, times the weight of the row."""
    known = jnp.matmul(cotangent, conceptor.astype(cotangent.dtype))
    return weight.astype(cotangent.dtype)[:, None] * known


def _anchor_pull(z, reference, labelled, loss_scale, axis_name):
    """Gradient of half the mean squared error to the reference on labelled rows."""
    arguments.check_range("loss_scale", loss_scale, "(0, inf)")
    if reference.shape != z.shape:
        raise ValueError(f"reference is {reference.shape}, but z is {z.shape}")
    z, reference = jax.lax.stop_gradient((z, reference))
    mask = labelled.astype(z.dtype)[:, None]
    count = labelled.sum(dtype=jnp.promote_types(z.dtype, jnp.float32))
    devices = 1
    if axis_name is not None:
        # Averaging over devices is to give the mean over all labelled rows.
        count = jax.lax.psum(count, axis_name)
        devices = jax.lax.axis_size(axis_name)
    factor = loss_scale * devices / (jnp.maximum(count, 1) * z.shape[1])
    return factor.astype(z.dtype) * jnp.where(mask > 0, mask * (z - reference), 0)


def _check_features(z, conceptor, **rows):
    """Raises on shapes that would broadcast or fail later without a clear reason."""
    if z.ndim != 2:
        raise ValueError(f"z has the shape {z.shape}, but must be (n, D)")
    _check_conceptor(z, conceptor)
    for name, value in rows.items():
        if value.shape != z.shape[:1]:
            raise ValueError(
                f"{name} has the shape {value.shape}, but z has {len(z)} rows: it "
                f"must be ({len(z)},)"
            )


def _check_conceptor(z, conceptor):
    size = z.shape[-1]
    if conceptor.shape != (size, size):
        raise ValueError(
            f"conceptor has the shape {conceptor.shape}, but z has {size} features: "
            f"it must be ({size}, {size}). Fit it on features of the same layer."
        )
