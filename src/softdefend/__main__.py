"""``python -m softdefend``."""

import sys

from softdefend.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
