"""Losses of SimGCD and of RankStats. Rows: all first views, then all second views."""

import jax
import jax.numpy as jnp

from examples.gcd.model import normalize

STUDENT_TEMPERATURE = 0.1


def simgcd(
    logits: jax.Array,
    projections: jax.Array,
    labels: jax.Array,
    labelled: jax.Array,
    teacher_temperature: jax.typing.ArrayLike,
    entropy_weight: float = 1.0,
) -> tuple[jax.Array, jax.Array]:
    """The supervised and the unsupervised objective; SimGCD adds 0.35 and 0.65 of them.

    Args:
      logits: cosines to the prototypes of all classes, shape (2 B, K).
      projections: for the contrastive losses, not normalised, shape (2 B, P).
      labels: class of each row, read where `labelled` only, shape (2 B,).
      labelled: which rows have a label, shape (2 B,).
      teacher_temperature: of the sharpened targets.
      entropy_weight: of the mean entropy term.
    """
    supervised = supervised_cross_entropy(logits, labels, labelled)
    supervised += supervised_contrast(projections, labels, labelled)
    unsupervised = self_distillation(logits, teacher_temperature)
    unsupervised += entropy_weight * mean_entropy(logits)
    unsupervised += contrast(projections)
    return supervised, unsupervised


def rank_statistics(
    z: jax.Array,
    logits: jax.Array,
    labels: jax.Array,
    labelled: jax.Array,
    k: int = 5,
) -> tuple[jax.Array, jax.Array]:
    """A second pair of objectives, in the manner of RankStats (Han et al., 2020).

    Two unlabelled images whose `k` strongest features are the same are taken to be
    of one class, all others of two; the two views of an image are to agree. Unlike
    the paper, one classifier serves known and novel classes, the consistency term is
    not ramped up, and the backbone is not pretrained without labels.
    """
    n = len(z) // 2
    magnitudes = jnp.abs(jax.lax.stop_gradient(z[:n]))
    strongest = jax.nn.one_hot(jax.lax.top_k(magnitudes, k)[1], z.shape[1]).sum(1)
    alike = strongest @ strongest.T > k - 0.5  # Counts of common features.

    probs = jax.nn.softmax(logits / STUDENT_TEMPERATURE)
    # Never exactly 0 or 1, where the logarithms below are infinite.
    same = jnp.clip(probs[:n] @ probs[n:].T, 1e-4, 1 - 1e-4)
    losses = -jnp.where(alike, jnp.log(same), jnp.log1p(-same))
    pairs = ~labelled[:n, None] & ~labelled[None, :n]
    consistency = jnp.sum((probs[:n] - probs[n:]) ** 2, 1).mean()
    supervised = supervised_cross_entropy(logits, labels, labelled)
    return supervised, _masked_mean(losses, pairs) + consistency


def supervised_cross_entropy(logits, labels, labelled):
    """Cross-entropy of the labelled rows; zero if there are none."""
    log_probs = jax.nn.log_softmax(logits / STUDENT_TEMPERATURE)
    # A label may be no class of a reference model; its row is then not labelled.
    picked = jnp.take_along_axis(
        log_probs, jnp.clip(labels, 0, logits.shape[1] - 1)[:, None], 1
    )[:, 0]
    return -_masked_mean(picked, labelled)


def self_distillation(logits, teacher_temperature):
    """Cross-entropy of each view's prediction with the other's, sharpened."""
    teacher = jax.lax.stop_gradient(jax.nn.softmax(logits / teacher_temperature))
    student = jax.nn.log_softmax(logits / STUDENT_TEMPERATURE)
    other_view = jnp.roll(teacher, len(logits) // 2, axis=0)
    return -jnp.sum(other_view * student, 1).mean()


def mean_entropy(logits):
    """How much the average prediction lacks of the greatest entropy."""
    mean = jax.nn.softmax(logits / STUDENT_TEMPERATURE).mean(0)
    log_mean = jnp.log(jnp.where(mean > 0, mean, 1))
    return jnp.log(logits.shape[1]) + jnp.sum(mean * log_mean)


def contrast(projections, temperature=1.0):
    """InfoNCE: the other view of an image against all other images' views.

    The temperature is that of SimGCD's code; its paper gives 0.07, and 1.0 to the
    supervised contrast.
    """
    similarities = _similarities(projections, temperature)
    log_probs = jax.nn.log_softmax(similarities)
    n = len(projections)
    rows = jnp.arange(n)
    return -log_probs[rows, (rows + n // 2) % n].mean()


def supervised_contrast(projections, labels, labelled, temperature=0.07):
    """SupCon among the labelled rows; zero if there are none."""
    similarities = _similarities(projections, temperature)
    similarities = jnp.where(labelled[None], similarities, -jnp.inf)
    # Unlabelled anchors are left out below; with no candidate they would be NaN.
    similarities = jnp.where(labelled[:, None], similarities, 0.0)
    log_probs = jax.nn.log_softmax(similarities)
    positive = (labels[:, None] == labels[None]) & labelled[:, None] & labelled[None]
    positive &= ~jnp.eye(len(labels), dtype=bool)
    # A labelled image is its own positive, through its other view.
    log_probs = jnp.where(positive, log_probs, 0.0).sum(1)
    return -_masked_mean(log_probs / jnp.maximum(positive.sum(1), 1), labelled)


def teacher_temperature(epoch, warmup_epochs, first=0.07, last=0.04):
    """Falls linearly over the warm-up epochs, both ends included; then constant."""
    share = jnp.clip(epoch / max(warmup_epochs - 1, 1), 0, 1)
    return first + (last - first) * share


def _similarities(projections, temperature):
    """Cosines over the temperature; a row is no candidate for itself."""
    rows = normalize(projections)
    own = jnp.eye(len(rows), dtype=bool)
    return jnp.where(own, -jnp.inf, rows @ rows.T / temperature)


def _masked_mean(values, mask):
    return jnp.where(mask, values, 0).sum() / jnp.maximum(mask.sum(), 1)
