"""`python -m sparge_compile`."""

import sys

from sparge_compile.command import main

sys.exit(main())
