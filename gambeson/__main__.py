"""`python -m gambeson` is `gambeson`."""

import os
import sys

from gambeson.cli import main

TOGETHER = ("run", "train", "train-diffusion", "train-encoder", "generate", "sample-grid", "evaluate")
"""Commands in which the processes that torchrun started share the work; any other one the first does alone."""

several = int(os.environ.get("WORLD_SIZE", 1)) > 1
idle = several and os.environ.get("RANK", "0") != "0" and sys.argv[1:2] not in [[name] for name in TOGETHER]
code = 0 if idle else main()
if several:
    from gambeson.distributed import leave

    leave(code)
sys.exit(code)
