"""Criteria: one file a paper, one frozen dataclass a criterion, whose fields are its hyper-parameters.

A criterion is called as `criterion(net, masks, data, generator)` and returns one score per prunable weight; higher =
keep.
"""

from sapwood.criteria.grasp import Grasp
from sapwood.criteria.magnitude import Magnitude
from sapwood.criteria.ntk_sap import NtkSap
from sapwood.criteria.ntk_sap_analytic import NtkSapAnalytic
from sapwood.criteria.ntk_sap_jvp import NtkSapJvp
from sapwood.criteria.obd import OptimalBrainDamage
from sapwood.criteria.prospr import ProsPr
from sapwood.criteria.px import PX
from sapwood.criteria.random import Random
from sapwood.criteria.skeletonization import Skeletonization
from sapwood.criteria.snip import Snip
from sapwood.criteria.synflow import SynFlow
from sapwood.criteria.synflow_l2 import SynFlowL2
from sapwood.criteria.taylor import Taylor

__all__ = [
    "PX",
    "Grasp",
    "Magnitude",
    "NtkSap",
    "NtkSapAnalytic",
    "NtkSapJvp",
    "OptimalBrainDamage",
    "ProsPr",
    "Random",
    "Skeletonization",
    "Snip",
    "SynFlow",
    "SynFlowL2",
    "Taylor",
]
