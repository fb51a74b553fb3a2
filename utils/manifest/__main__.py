"""`python -m utils.manifest`: see `utils.manifest.command.main`."""

import sys

import tyro

from utils.manifest.command import main
from utils.utils_funcs import UserError

if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m utils.manifest")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
