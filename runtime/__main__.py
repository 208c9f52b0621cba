"""`python -m anabranch.runtime`, the command line; also `torchrun … -m anabranch.runtime train CONFIG`."""

import sys

from anabranch.runtime.cli import main

if __name__ == "__main__":
    sys.exit(main())
