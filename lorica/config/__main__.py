"""`python -m lorica.config CONFIG`: the same as `lorica check CONFIG`."""

import sys

from lorica.config.report import check

sys.exit(check(sys.argv[1:]))
