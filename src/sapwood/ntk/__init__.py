"""The neural tangent kernel of dense and pruned networks: kernel, trace, spectrum, expectation, infinite width.

Convention, everywhere: of n samples with k outputs each, output c of sample i is row i * k + c. Samples vary slowest,
outputs fastest.
"""

from sapwood.ntk.analytic import analytic_kernel
from sapwood.ntk.compare import alignment, distance
from sapwood.ntk.dynamics import Dynamics, linearised, train_dynamics
from sapwood.ntk.expected import Expected, expected_kernel
from sapwood.ntk.gram import kernel
from sapwood.ntk.options import Options
from sapwood.ntk.products import Products, products
from sapwood.ntk.spectra import Spectrum, spectrum
from sapwood.ntk.traces import Trace, trace

__all__ = [
    "Dynamics",
    "Expected",
    "Options",
    "Products",
    "Spectrum",
    "Trace",
    "alignment",
    "analytic_kernel",
    "distance",
    "expected_kernel",
    "kernel",
    "linearised",
    "products",
    "spectrum",
    "trace",
    "train_dynamics",
]
