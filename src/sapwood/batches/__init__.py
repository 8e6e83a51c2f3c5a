"""What a criterion may look at: labelled batches, unlabelled ones, or only the shape of an input.

A batch is opaque to everything but this room. The rules:

* A tensor is inputs without targets. A tuple or list of two is (input, target), of one an input; more are refused. A
  mapping is keyword arguments of the model (Hugging Face style), its targets the first of `labels`, `label`, `target`,
  `targets` that it has. Dataclasses, and named tuples of other than two fields, are mappings of their fields.
* Inputs that are neither a tensor nor a mapping (a tuple, a list, a graph) are the model's one positional argument.
* Samples are in the first dimension of every input, if all have the same number of rows and the model, run on two of
  them, treats rows as samples; else a batch is one whole, never cut, repeated or resampled.
* A lone floating-point tensor is numbers, which a data-free method replaces by its own. Beside other tensors, what
  is numbers has to be said (`draw`). Integers always stay.
* The default loss is the mean over targets that are not -100, and batches weigh by their number. Of a user's loss and
  of a model's own it is found out what they are a mean over (`units`), or a user's says it.
"""

from sapwood.batches.data import Data
from sapwood.batches.drawing import Draw, filled
from sapwood.batches.losses import (
    Measured,
    classes_last,
    counted,
    cross_entropy,
    measured,
    output_tensor,
    own_loss,
)
from sapwood.batches.reading import Batch, argument, as_batch, call, cast, inputs_of, label_of, target_of
from sapwood.batches.slicing import (
    first,
    parts,
    resized,
    samples,
    size,
    size_or_one,
    sliceable,
    sliced,
    small,
    taken,
)
from sapwood.batches.trees import Argument, described, mapped, moved, tensors
from sapwood.batches.units import Counts, counts

__all__ = [
    "Argument",
    "Batch",
    "Counts",
    "Data",
    "Draw",
    "Measured",
    "argument",
    "as_batch",
    "call",
    "cast",
    "classes_last",
    "counted",
    "counts",
    "cross_entropy",
    "described",
    "filled",
    "first",
    "inputs_of",
    "label_of",
    "mapped",
    "measured",
    "moved",
    "output_tensor",
    "own_loss",
    "parts",
    "resized",
    "samples",
    "size",
    "size_or_one",
    "sliceable",
    "sliced",
    "small",
    "taken",
    "target_of",
    "tensors",
]
