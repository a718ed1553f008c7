"""`python -m lstm_triton.bench`."""

import sys

from .cli import main

sys.exit(main())
