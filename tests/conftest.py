"""Every test runs with the shapes and types of the house checked (jaxtyping + beartype) and on one thread."""

import sys

import torch
from checked import check_all

if not any(name.startswith("gambeson.") for name in sys.modules):
    check_all("gambeson")

torch.set_num_threads(1)
