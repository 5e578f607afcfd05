"""Weights of the tasks as pure functions of small arrays, by short names."""

from optax_mtl.methods.balance.excess_mtl import excess_mtl_weights as excess_mtl
from optax_mtl.methods.balance.fairgrad import fairgrad_weights as fairgrad
from optax_mtl.methods.balance.imtl_g import imtl_g_weights as imtl_g
from optax_mtl.methods.balance.inverse_norm import inverse_norm_weights as inverse_norm
from optax_mtl.methods.balance.nash_mtl import nash_mtl_weights as nash_mtl
from optax_mtl.methods.balance.pivrg import pivrg_weights as pivrg
from optax_mtl.methods.baseline.random_weights import draw as random
from optax_mtl.methods.conflict.aligned_mtl import aligned_mtl_weights as aligned_mtl
from optax_mtl.methods.conflict.cagrad import cagrad_weights as cagrad
from optax_mtl.methods.conflict.config import config_weights as config
from optax_mtl.methods.conflict.dualproj import dualproj_weights as dualproj
from optax_mtl.methods.conflict.epo import epo_weights as epo
from optax_mtl.methods.conflict.fedmgda import fedmgda_weights as fedmgda
from optax_mtl.methods.conflict.gradvac import gradvac_weights as gradvac
from optax_mtl.methods.conflict.imgrad import imgrad_weights as imgrad
from optax_mtl.methods.conflict.mgda import mgda_weights as mgda
from optax_mtl.methods.conflict.mmpareto import mmpareto_weights as mmpareto
from optax_mtl.methods.conflict.pareto_mtl import pareto_mtl_weights as pareto_mtl
from optax_mtl.methods.conflict.pcgrad import pcgrad_weights as pcgrad
from optax_mtl.methods.conflict.sdmgrad import sdmgrad_weights as sdmgrad
from optax_mtl.methods.conflict.upgrad import upgrad_weights as upgrad
from optax_mtl.methods.loss.cosmos import cosmos_weights as cosmos
from optax_mtl.methods.loss.dwa import dwa_weights as dwa
from optax_mtl.methods.loss.famo import famo_weights as famo
from optax_mtl.methods.loss.gls import gls_weights as gls
from optax_mtl.methods.loss.go4align import go4align_weights as go4align
from optax_mtl.methods.loss.group_dro import group_dro_weights as group_dro
from optax_mtl.methods.loss.igb import igb_weights as igb
from optax_mtl.methods.loss.pbi import pbi_weights as pbi
from optax_mtl.methods.loss.slaw import slaw_weights as slaw
from optax_mtl.methods.loss.stch import stch_linear_weights as stch_linear
from optax_mtl.methods.loss.stch import stch_weights as stch
from optax_mtl.methods.loss.uw_so import uw_so_weights as uw_so
from optax_mtl.methods.loss.v_rex import v_rex_weights as v_rex
from optax_mtl.methods.priority.adaptive_weight import (
    adaptive_weight_weights as adaptive_weight,
)
from optax_mtl.methods.priority.cosine_gating import (
    cosine_gating_weights as cosine_gating,
)
from optax_mtl.methods.priority.dynamic_barrier import (
    dynamic_barrier_weights as dynamic_barrier,
)
from optax_mtl.methods.priority.pcd import pcd_weights as pcd
from optax_mtl.methods.priority.priority_projection import (
    priority_projection_weights as priority_projection,
)
from optax_mtl.methods.robust.geometric_median import (
    geometric_median_weights as geometric_median,
)
from optax_mtl.methods.robust.gradient_agreement_filter import (
    gradient_agreement_filter_weights as gradient_agreement_filter,
)
from optax_mtl.methods.robust.krum import krum_weights as krum

__all__ = [
    "adaptive_weight",
    "aligned_mtl",
    "cagrad",
    "config",
    "cosine_gating",
    "cosmos",
    "dualproj",
    "dwa",
    "dynamic_barrier",
    "epo",
    "excess_mtl",
    "fairgrad",
    "famo",
    "fedmgda",
    "geometric_median",
    "gls",
    "go4align",
    "gradient_agreement_filter",
    "gradvac",
    "group_dro",
    "igb",
    "imgrad",
    "imtl_g",
    "inverse_norm",
    "krum",
    "mgda",
    "mmpareto",
    "nash_mtl",
    "pareto_mtl",
    "pbi",
    "pcd",
    "pcgrad",
    "pivrg",
    "priority_projection",
    "random",
    "sdmgrad",
    "slaw",
    "stch",
    "stch_linear",
    "upgrad",
    "uw_so",
    "v_rex",
]
