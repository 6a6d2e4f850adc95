"""`python -m gambeson` is `gambeson`."""

import os
import sys

from gambeson.cli import main

code = main()
if int(os.environ.get("WORLD_SIZE", 1)) > 1:
    from gambeson.distributed import leave

    leave(code)
sys.exit(code)
