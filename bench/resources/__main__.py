"""`python -m bench.resources`: see `resources`."""

import sys

from .resources import main

if __name__ == "__main__":
    sys.exit(main())
