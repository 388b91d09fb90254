"""`python -m sf_local` is the command `sf-local`."""

import sys

from sf_local.cli import main

if __name__ == "__main__":
    sys.exit(main())
