"""`python -m apollo_optim` is `apollo-optim`."""

import sys

from apollo_optim.cli.main import main

sys.exit(main())
