"""Weights of the tasks as pure functions of small arrays, by short names."""

from optax_mtl.methods.cagrad import cagrad_weights as cagrad
from optax_mtl.methods.dwa import dwa_weights as dwa
from optax_mtl.methods.pcgrad import pcgrad_weights as pcgrad

__all__ = ["cagrad", "dwa", "pcgrad"]
