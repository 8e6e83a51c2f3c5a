"""Sapwood: prune any PyTorch model before it is trained.

>>> import torch, sapwood
>>> model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
>>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
>>> result = sapwood.prune(model, sparsity=0.9, input_shape=(8,))
>>> handle = sapwood.attach(result.masks, model, optimizer)  # zeros that stay zero, in your own training loop
"""

from sapwood.allocation import Global, Layerwise
from sapwood.attach import Attachment, assert_masked, attach
from sapwood.batches import Data
from sapwood.criteria import (
    PX,
    Grasp,
    Magnitude,
    NtkSap,
    NtkSapAnalytic,
    NtkSapJvp,
    OptimalBrainDamage,
    ProsPr,
    Random,
    Skeletonization,
    Snip,
    SynFlow,
    SynFlowL2,
    Taylor,
)
from sapwood.errors import (
    BudgetError,
    ConfigError,
    DataError,
    MaskError,
    MaskFileError,
    SapwoodError,
    SapwoodWarning,
    ScoreError,
    UnsupportedModelError,
)
from sapwood.functional import FunctionalModel
from sapwood.interop import from_torch_prune, to_torch_prune
from sapwood.masks import Masks, fingerprint
from sapwood.methods import METHODS, ScoreCheck, check_score, imp, prunable, prune
from sapwood.methods.ntt import Ntt
from sapwood.methods.obs import Obs
from sapwood.pruning import Method, Procedure, Result, Round, iterate
from sapwood.version import __version__

__all__ = [
    "METHODS",
    "PX",
    "Attachment",
    "BudgetError",
    "ConfigError",
    "Data",
    "DataError",
    "FunctionalModel",
    "Global",
    "Grasp",
    "Layerwise",
    "Magnitude",
    "MaskError",
    "MaskFileError",
    "Masks",
    "Method",
    "NtkSap",
    "NtkSapAnalytic",
    "NtkSapJvp",
    "Ntt",
    "Obs",
    "OptimalBrainDamage",
    "Procedure",
    "ProsPr",
    "Random",
    "Result",
    "Round",
    "SapwoodError",
    "SapwoodWarning",
    "ScoreCheck",
    "ScoreError",
    "Skeletonization",
    "Snip",
    "SynFlow",
    "SynFlowL2",
    "Taylor",
    "UnsupportedModelError",
    "__version__",
    "assert_masked",
    "attach",
    "check_score",
    "fingerprint",
    "from_torch_prune",
    "imp",
    "iterate",
    "prunable",
    "prune",
    "to_torch_prune",
]
