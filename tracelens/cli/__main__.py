"""`python -m tracelens.cli`."""

import sys

from tracelens.cli import main

sys.exit(main())
