"""`python -m gambeson` is `gambeson`."""

import sys

from gambeson.cli import main

sys.exit(main())
