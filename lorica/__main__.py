"""`python -m lorica` is the `lorica` command."""

import sys

from lorica.cli import main

sys.exit(main())
