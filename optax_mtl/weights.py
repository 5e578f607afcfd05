"""Weights of the tasks as pure functions of small arrays, by short names."""

from optax_mtl.methods.aligned_mtl import aligned_mtl_weights as aligned_mtl
from optax_mtl.methods.cagrad import cagrad_weights as cagrad
from optax_mtl.methods.config import config_weights as config
from optax_mtl.methods.cosine_gating import cosine_gating_weights as cosine_gating
from optax_mtl.methods.cosmos import cosmos_weights as cosmos
from optax_mtl.methods.dualproj import dualproj_weights as dualproj
from optax_mtl.methods.dwa import dwa_weights as dwa
from optax_mtl.methods.dynamic_barrier import dynamic_barrier_weights as dynamic_barrier
from optax_mtl.methods.excess_mtl import excess_mtl_weights as excess_mtl
from optax_mtl.methods.fairgrad import fairgrad_weights as fairgrad
from optax_mtl.methods.famo import famo_weights as famo
from optax_mtl.methods.geometric_median import (
    geometric_median_weights as geometric_median,
)
from optax_mtl.methods.gls import gls_weights as gls
from optax_mtl.methods.gradvac import gradvac_weights as gradvac
from optax_mtl.methods.igb import igb_weights as igb
from optax_mtl.methods.imtl_g import imtl_g_weights as imtl_g
from optax_mtl.methods.inverse_norm import inverse_norm_weights as inverse_norm
from optax_mtl.methods.krum import krum_weights as krum
from optax_mtl.methods.mgda import mgda_weights as mgda
from optax_mtl.methods.nash_mtl import nash_mtl_weights as nash_mtl
from optax_mtl.methods.pbi import pbi_weights as pbi
from optax_mtl.methods.pcd import pcd_weights as pcd
from optax_mtl.methods.pcgrad import pcgrad_weights as pcgrad
from optax_mtl.methods.priority_projection import (
    priority_projection_weights as priority_projection,
)
from optax_mtl.methods.random_weights import draw as random
from optax_mtl.methods.sdmgrad import sdmgrad_weights as sdmgrad
from optax_mtl.methods.stch import stch_linear_weights as stch_linear
from optax_mtl.methods.stch import stch_weights as stch
from optax_mtl.methods.upgrad import upgrad_weights as upgrad
from optax_mtl.methods.uw_so import uw_so_weights as uw_so

__all__ = [
    "aligned_mtl",
    "cagrad",
    "config",
    "cosine_gating",
    "cosmos",
    "dualproj",
    "dwa",
    "dynamic_barrier",
    "excess_mtl",
    "fairgrad",
    "famo",
    "geometric_median",
    "gls",
    "gradvac",
    "igb",
    "imtl_g",
    "inverse_norm",
    "krum",
    "mgda",
    "nash_mtl",
    "pbi",
    "pcd",
    "pcgrad",
    "priority_projection",
    "random",
    "sdmgrad",
    "stch",
    "stch_linear",
    "upgrad",
    "uw_so",
]
