"""Criteria: one file a paper, one frozen dataclass a criterion, whose fields are its hyper-parameters.

A criterion is called as `criterion(net, masks, data, generator)` and returns one score per prunable weight; higher =
keep.
"""

from sapwood.criteria.grasp import Grasp
from sapwood.criteria.magnitude import Magnitude
from sapwood.criteria.ntk_sap import NtkSap
from sapwood.criteria.ntk_sap_analytic import NtkSapAnalytic
from sapwood.criteria.random import Random
from sapwood.criteria.snip import Snip
from sapwood.criteria.synflow import SynFlow

__all__ = ["Grasp", "Magnitude", "NtkSap", "NtkSapAnalytic", "Random", "Snip", "SynFlow"]
