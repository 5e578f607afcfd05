"""Which methods to race, from a report of conflict; a heuristic."""

import numpy as np

from optax_mtl import arguments, measures

# Rules of thumb, not results.
MIN_COSINE = -0.05  # Tasks count as opposed below.
FAR_APART = 3.0  # Ratio of norms from which the larger task counts as dominant.


def recommend(report: measures.Conflicts, num_params: int | None = None) -> str:
    """Proposes methods to race, or says that there is nothing to repair.

    A heuristic, not a result: :func:`compare` decides. It reads how opposed the
    gradients are, how far apart their norms, and what they would cost.

    Args:
      report: what :func:`conflicts` returned for one batch, or better the mean of
        several reports.
      num_params: number of shared parameters, for the memory of their gradients.

    Returns:
      A few sentences, each with the figure that it rests on.

    Raises:
      TypeError: for something else than a report of one batch.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax_mtl
      >>> report = optax_mtl.conflicts(jnp.array([[1.0, -0.5], [-0.5, 1.0]]))
      >>> for part in optax_mtl.recommend(report).replace(": ", ". ").split(". "):
      ...     print(part)
      The smallest cosine is -0.50 and 100 % of the pairs conflict
      race upgrad and cagrad
      With 2 tasks, the weights of the sum can be tuned, too.
    """
    if not isinstance(report, measures.Conflicts) or np.ndim(report.norms) != 1:
        raise TypeError(
            "recommend takes a report of one batch: call"
            " recommend(conflicts(gram(updates)))"
        )
    arguments.check_count("num_params", num_params, optional=True)
    return " ".join(_sentences(report, num_params))


def _sentences(report, num_params):
    norms = np.asarray(report.norms, np.float64)
    if not np.all(np.isfinite(norms)):
        yield (
            "Gradients that are not finite: put zero_nonfinite around the chain, and"
            " look for their cause first."
        )
        return
    norms = norms[norms > 0]
    num_tasks = len(norms)
    if num_tasks < 2:
        yield f"Nothing to resolve: {num_tasks} of the tasks has a gradient."
        return
    cosine, ratio = float(report.min_cosine), float(norms.max() / norms.min())
    share = 100 * float(report.conflicting)
    opposed, apart = cosine < MIN_COSINE, ratio > FAR_APART
    if not opposed and not apart:
        yield (
            f"Nothing to repair: the smallest cosine is {cosine:.2f} and norms differ"
            f" by a factor of {ratio:.1f}. Keep the sum."
        )
        return
    if apart:
        yield (
            f"Norms differ by a factor of {ratio:.1f}, so that the largest task decides"
            " the direction of the sum: race imtl_l, which takes one backward pass, and"
            " nash_mtl."
        )
    if opposed:
        yield (
            f"The smallest cosine is {cosine:.2f} and {share:.0f} % of the pairs"
            " conflict: race upgrad and cagrad."
        )
    if num_tasks <= 4:
        yield f"With {num_tasks} tasks, the weights of the sum can be tuned, too."
    elif num_tasks > 16:
        yield (
            f"{num_tasks} tasks cost as many backward passes a step: race famo, too, or"
            " update_every of the others."
        )
    if num_params:
        size = num_tasks * num_params * 4 / 1e9
        if size > 1:
            yield (
                f"All gradients would take {size:.1f} GB: value_and_grad holds one leaf"
                " of them at a time, for the methods named here."
            )
