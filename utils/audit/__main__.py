"""`python -m utils.audit`: see `utils.audit.page.main`."""

import sys

import tyro

from utils.audit.page import main
from utils.utils_funcs import UserError

if __name__ == "__main__":
    try:
        tyro.cli(main, prog="python -m utils.audit")
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
