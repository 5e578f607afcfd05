"""What the suites over the catalog share: methods, gradients, samplers."""

import jax
import pytest

import optax_mtl
from optax_mtl.testing import contract
from optax_mtl.testing.contract import run as run
from optax_mtl.testing.samples import NUM_PARAMS as NUM_PARAMS
from optax_mtl.testing.samples import NUM_TASKS as NUM_TASKS
from optax_mtl.testing.samples import badly_scaled as badly_scaled
from optax_mtl.testing.samples import compiled_fast as compiled_fast
from optax_mtl.testing.samples import losses as losses
from optax_mtl.testing.samples import matrices as matrices
from optax_mtl.testing.samples import normal as normal
from optax_mtl.testing.samples import params as params
from optax_mtl.testing.samples import stacked as stacked
from optax_mtl.testing.samples import strongly_stationary as strongly_stationary
from optax_mtl.testing.samples import weakly_stationary as weakly_stationary

every_method = pytest.mark.parametrize("name", list(optax_mtl.METHODS))


def flops(fn, *args):
    """Floating-point operations of the compiled function, by the compiler."""
    return jax.jit(fn).lower(*args).compile().cost_analysis()["flops"]


def temporary_memory(fn, *args):
    """Bytes that the compiled function needs beside arguments and results."""
    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def compiled(name, num_tasks=3):
    """The method, and its compiled step on updates and state."""
    return contract.compiled(optax_mtl.METHODS[name].make, num_tasks)
