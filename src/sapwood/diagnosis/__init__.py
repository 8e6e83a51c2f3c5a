"""What a mask leaves of a network, found by probing: effective weights, dead and bottleneck units, paths, gradients."""

from sapwood.diagnosis.paths import effective
from sapwood.diagnosis.report import Diagnosis, LayerDiagnosis, diagnose

__all__ = ["Diagnosis", "LayerDiagnosis", "diagnose", "effective"]
