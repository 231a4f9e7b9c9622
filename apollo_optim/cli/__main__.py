"""`python -m apollo_optim.cli` is `apollo-optim`."""

import sys

from .main import main

sys.exit(main())
