"""`python -m diffora_trainer`: the command `diffora`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
