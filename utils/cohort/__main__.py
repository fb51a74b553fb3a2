"""`python -m utils.cohort`: see `utils.cohort.table.main`."""

import sys

import tyro

from utils.cohort.table import main
from utils.utils_funcs import UserError

if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m utils.cohort")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
