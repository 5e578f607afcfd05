"""Multi-task gradient-conflict resolution as pure Optax transformations."""

from optax_mtl import solvers as solvers
from optax_mtl import weights as weights
from optax_mtl.agreement import scale_by_agreement as scale_by_agreement
from optax_mtl.base import from_gram as from_gram
from optax_mtl.base import from_losses as from_losses
from optax_mtl.base import from_state as from_state
from optax_mtl.catalog import METHODS as METHODS
from optax_mtl.catalog import Entry as Entry
from optax_mtl.catalog import get as get
from optax_mtl.checks import check as check
from optax_mtl.compare import compare as compare
from optax_mtl.comparison import Comparison as Comparison
from optax_mtl.gradients.accumulated import (
    accumulate_task_grads as accumulate_task_grads,
)
from optax_mtl.gradients.at_features import (
    value_and_grad_at_features as value_and_grad_at_features,
)
from optax_mtl.gradients.multi_steps import MultiStepsState as MultiStepsState
from optax_mtl.gradients.multi_steps import has_updated as has_updated
from optax_mtl.gradients.multi_steps import multi_steps as multi_steps
from optax_mtl.gradients.multi_steps import next_task as next_task
from optax_mtl.gradients.resolved import value_and_grad as value_and_grad
from optax_mtl.gradients.split import split_tasks as split_tasks
from optax_mtl.gradients.stacked import value_and_task_grads as value_and_task_grads
from optax_mtl.guards import apply_if_finite as apply_if_finite
from optax_mtl.guards import apply_updates as apply_updates
from optax_mtl.guards import checked as checked
from optax_mtl.guards import zero_nonfinite as zero_nonfinite
from optax_mtl.in_front import log_losses as log_losses
from optax_mtl.in_front import per_task as per_task
from optax_mtl.in_front import reweigh as reweigh
from optax_mtl.measures import Conflicts as Conflicts
from optax_mtl.measures import conflicts as conflicts
from optax_mtl.measures import conflicts_by_group as conflicts_by_group
from optax_mtl.measures import cosine_similarity as cosine_similarity
from optax_mtl.measures import dominance as dominance
from optax_mtl.measures import magnitude_similarity as magnitude_similarity
from optax_mtl.measures import update_cosines as update_cosines
from optax_mtl.methods.balance.adatask import adatask as adatask
from optax_mtl.methods.balance.db_mtl import db_mtl as db_mtl
from optax_mtl.methods.balance.energy_gate import energy_gate as energy_gate
from optax_mtl.methods.balance.excess_mtl import excess_mtl as excess_mtl
from optax_mtl.methods.balance.fairgrad import fairgrad as fairgrad
from optax_mtl.methods.balance.gradnorm import gradnorm as gradnorm
from optax_mtl.methods.balance.imtl import imtl as imtl
from optax_mtl.methods.balance.imtl_g import imtl_g as imtl_g
from optax_mtl.methods.balance.inverse_norm import inverse_norm as inverse_norm
from optax_mtl.methods.balance.loss_balancer import loss_balancer as loss_balancer
from optax_mtl.methods.balance.lr_annealing import lr_annealing as lr_annealing
from optax_mtl.methods.balance.nash_mtl import nash_mtl as nash_mtl
from optax_mtl.methods.balance.pivrg import pivrg as pivrg
from optax_mtl.methods.balance.sam_gs import sam_gs as sam_gs
from optax_mtl.methods.baseline.linear import linear as linear
from optax_mtl.methods.baseline.linear import mean as mean
from optax_mtl.methods.baseline.linear import mean_tasks as mean_tasks
from optax_mtl.methods.baseline.linear import sum_tasks as sum_tasks
from optax_mtl.methods.baseline.random_weights import random_weights as random_weights
from optax_mtl.methods.conflict.aligned_mtl import aligned_mtl as aligned_mtl
from optax_mtl.methods.conflict.cagrad import cagrad as cagrad
from optax_mtl.methods.conflict.config import config as config
from optax_mtl.methods.conflict.dualproj import dualproj as dualproj
from optax_mtl.methods.conflict.eagc import EAGCState as EAGCState
from optax_mtl.methods.conflict.eagc import coordinate as coordinate
from optax_mtl.methods.conflict.eagc import eagc as eagc
from optax_mtl.methods.conflict.eagc import eagc_pull_backs as eagc_pull_backs
from optax_mtl.methods.conflict.eagc import eagc_weights as eagc_weights
from optax_mtl.methods.conflict.eagc import energy_ratio as energy_ratio
from optax_mtl.methods.conflict.eagc import fit_conceptor as fit_conceptor
from optax_mtl.methods.conflict.epo import epo as epo
from optax_mtl.methods.conflict.fedmgda import fedmgda as fedmgda
from optax_mtl.methods.conflict.ferero import ferero as ferero
from optax_mtl.methods.conflict.gcond import Arbitration as Arbitration
from optax_mtl.methods.conflict.gcond import gcond as gcond
from optax_mtl.methods.conflict.gcond import scale_by_lion_lars as scale_by_lion_lars
from optax_mtl.methods.conflict.graddrop import graddrop as graddrop
from optax_mtl.methods.conflict.gradvac import gradvac as gradvac
from optax_mtl.methods.conflict.imgrad import imgrad as imgrad
from optax_mtl.methods.conflict.m_config import m_config as m_config
from optax_mtl.methods.conflict.mgda import mgda as mgda
from optax_mtl.methods.conflict.mmpareto import mmpareto as mmpareto
from optax_mtl.methods.conflict.moco import moco as moco
from optax_mtl.methods.conflict.modo import modo as modo
from optax_mtl.methods.conflict.pareto_mtl import pareto_mtl as pareto_mtl
from optax_mtl.methods.conflict.pcgrad import pcgrad as pcgrad
from optax_mtl.methods.conflict.sdmgrad import sdmgrad as sdmgrad
from optax_mtl.methods.conflict.upgrad import upgrad as upgrad
from optax_mtl.methods.loss.cosmos import cosmos as cosmos
from optax_mtl.methods.loss.cov_weighting import cov_weighting as cov_weighting
from optax_mtl.methods.loss.dwa import dwa as dwa
from optax_mtl.methods.loss.famo import famo as famo
from optax_mtl.methods.loss.famo import famo_update as famo_update
from optax_mtl.methods.loss.gls import gls as gls
from optax_mtl.methods.loss.go4align import go4align as go4align
from optax_mtl.methods.loss.group_dro import group_dro as group_dro
from optax_mtl.methods.loss.igb import igb as igb
from optax_mtl.methods.loss.imtl_l import imtl_l as imtl_l
from optax_mtl.methods.loss.ldc_mtl import ldc_mtl as ldc_mtl
from optax_mtl.methods.loss.pbi import pbi as pbi
from optax_mtl.methods.loss.relobralo import relobralo as relobralo
from optax_mtl.methods.loss.scale_invariant import scale_invariant as scale_invariant
from optax_mtl.methods.loss.slaw import slaw as slaw
from optax_mtl.methods.loss.softadapt import softadapt as softadapt
from optax_mtl.methods.loss.stch import stch as stch
from optax_mtl.methods.loss.uncertainty_weighting import (
    uncertainty_weighting as uncertainty_weighting,
)
from optax_mtl.methods.loss.uw_so import uw_so as uw_so
from optax_mtl.methods.loss.v_rex import v_rex as v_rex
from optax_mtl.methods.priority.adaptive_weight import (
    adaptive_weight as adaptive_weight,
)
from optax_mtl.methods.priority.bloop import bloop as bloop
from optax_mtl.methods.priority.cosine_gating import cosine_gating as cosine_gating
from optax_mtl.methods.priority.dynamic_barrier import (
    dynamic_barrier as dynamic_barrier,
)
from optax_mtl.methods.priority.metabalance import metabalance as metabalance
from optax_mtl.methods.priority.pcd import pcd as pcd
from optax_mtl.methods.priority.priority_projection import (
    priority_projection as priority_projection,
)
from optax_mtl.methods.robust.and_mask import and_mask as and_mask
from optax_mtl.methods.robust.coordinate_median import (
    coordinate_median as coordinate_median,
)
from optax_mtl.methods.robust.dare import dare as dare
from optax_mtl.methods.robust.geometric_median import (
    geometric_median as geometric_median,
)
from optax_mtl.methods.robust.gradient_agreement_filter import (
    gradient_agreement_filter as gradient_agreement_filter,
)
from optax_mtl.methods.robust.krum import krum as krum
from optax_mtl.methods.robust.sand_mask import sand_mask as sand_mask
from optax_mtl.methods.robust.ties import ties as ties
from optax_mtl.methods.robust.trimmed_mean import trimmed_mean as trimmed_mean
from optax_mtl.names import group_losses as group_losses
from optax_mtl.recommend import recommend as recommend
from optax_mtl.record import Record as Record
from optax_mtl.record import record_conflicts as record_conflicts
from optax_mtl.record import recorded as recorded
from optax_mtl.scores import delta_m as delta_m
from optax_mtl.scores import hypervolume as hypervolume
from optax_mtl.scores import mean_rank as mean_rank
from optax_mtl.tasks import GramView as GramView
from optax_mtl.tasks import combine as combine
from optax_mtl.tasks import gram as gram
from optax_mtl.wrappers import fix_weights as fix_weights
from optax_mtl.wrappers import measure_on as measure_on
from optax_mtl.wrappers import per_group as per_group
from optax_mtl.wrappers import smooth_weights as smooth_weights
from optax_mtl.wrappers import update_every as update_every
from optax_mtl.wrappers import with_sharded_parameters as with_sharded_parameters

__version__ = "0.1.0"
