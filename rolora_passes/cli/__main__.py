"""`python -m rolora_passes.cli`, as `python -m rolora_passes`."""

import sys

from rolora_passes.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
