"""A ``TrainState`` for Flax Linen that hands the losses on to the method."""

import functools
from typing import Any

import optax
from flax.training import train_state

from optax_mtl import guards


class TrainState(train_state.TrainState):
    """Flax's ``TrainState``, whose ``apply_gradients`` takes ``losses`` as well.

    Examples:
      >>> import jax.numpy as jnp
      >>> import optax, optax_mtl
      >>> from optax_mtl.linen import TrainState
      >>> tx = optax.chain(optax_mtl.scale_invariant(), optax.sgd(1.0))
      >>> state = TrainState.create(apply_fn=None, params={"w": jnp.zeros(2)}, tx=tx)
      >>> grads, losses = {"w": jnp.array([[4.0, 2], [3, 3]])}, jnp.array([2.0, 1])
      >>> state = state.apply_gradients(grads=grads, losses=losses)
      >>> print(state.step, state.params["w"])
      1 [-5. -4.]
    """

    def apply_gradients(
        self, *, grads: optax.Updates, losses: Any = None, **kwargs: Any
    ) -> "TrainState":
        """Updates the parameters, the state of the chain and the number of steps.

        Args:
          grads: task gradients, as of :func:`~optax_mtl.value_and_task_grads`.
          losses: those of the tasks, for methods that read them.
          **kwargs: further fields to replace, such as batch statistics.

        Raises:
          TypeError: if a method needs the losses, and for an unknown field.
          ValueError: where the parameters or the state would change their shapes.
        """
        tx = guards.checked(self.tx)
        update = functools.partial(tx.update, losses=losses)
        state = self.replace(tx=optax.GradientTransformation(tx.init, update))
        new_state = super(TrainState, state).apply_gradients(grads=grads, **kwargs)
        return new_state.replace(tx=self.tx)
