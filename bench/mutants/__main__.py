"""`python -m bench.mutants`: see `mutants`."""

import sys

from .mutants import main

if __name__ == "__main__":
    sys.exit(main())
