"""`python -m bench.counts`: see `counts`."""

import sys

from .counts import main

if __name__ == "__main__":
    sys.exit(main())
