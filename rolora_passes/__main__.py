"""`python -m rolora_passes`, which is how torchrun starts the command line."""

import sys

from rolora_passes.cli import main

sys.exit(main())
