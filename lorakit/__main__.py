"""`python -m lorakit`, the command."""

import sys

from lorakit.cli import main

sys.exit(main())
