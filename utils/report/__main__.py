"""`python -m utils.report`."""

from utils.report.command import main

if __name__ == "__main__":
    main()
