"""What W is: the shared parameters on which the tasks' gradients are compared.

Given by the user (a module, a parameter, several of them, a dotted name), or found from the autograd graph and the tasks'
gradients in the first training batches. The paper takes "generally the last shared layer", to save on compute.
"""

from lightning_gradnorm.shared_layer.given import (
    SharedLayerSpec,
    feature_modules,
    is_compiled,
    owner_of,
    resolve_shared_layer,
    shared_features,
)
from lightning_gradnorm.shared_layer.layer import SharedLayer
from lightning_gradnorm.shared_layer.search import SharedLayerSearch, detect_shared_layer

__all__ = [
    "SharedLayer",
    "SharedLayerSearch",
    "SharedLayerSpec",
    "detect_shared_layer",
    "feature_modules",
    "is_compiled",
    "owner_of",
    "resolve_shared_layer",
    "shared_features",
]
