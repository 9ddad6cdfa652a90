"""`python -m rolora_passes.cli`, as `python -m rolora_passes`."""

import sys

from rolora_passes.cli.main import main

sys.exit(main())
