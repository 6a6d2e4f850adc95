"""Every test runs with the shapes and types of the house checked (jaxtyping + beartype) and on one thread."""

import sys

import torch
from jaxtyping import install_import_hook

if not any(name.startswith("gambeson.") for name in sys.modules):
    install_import_hook("gambeson", "beartype.beartype")

torch.set_num_threads(1)
