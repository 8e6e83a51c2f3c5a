"""`python -m sapwood` is the program `sapwood`."""

import sys

from sapwood.cli import main

if __name__ == "__main__":
    sys.exit(main())
