"""Masks on a model that trains: the model itself keeps its pruned weights at zero, whatever writes to them.

Three looks at the tensors, none at names of classes: a hook on each masked weight zeroes the pruned
part of its gradients before they are accumulated (`gradients`), hooks on the modules zero the pruned
weights before every forward pass and in every state dict (`guard`), and every optimizer that steps
a masked weight is seen by hooks that torch offers for all optimizers (`stepping`).
"""

from sapwood.attach.attachment import Attachment, attach
from sapwood.attach.check import assert_masked

__all__ = ["Attachment", "assert_masked", "attach"]
