"""Arrays and gradients: tensors, operations, backward, and the check that they are right. Knows nothing of models."""

from . import ops  # noqa: F401 - gives Tensor its operators
