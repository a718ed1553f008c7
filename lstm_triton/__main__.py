"""`python -m lstm_triton`: the `lstm-triton` command."""

import sys

from lstm_triton.cli import main

sys.exit(main())
