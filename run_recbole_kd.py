"""Distil a RecBole model: ``python run_recbole_kd.py --help``."""

import sys

try:
    from recbole_rcekd.cli import main
except ModuleNotFoundError as error:
    sys.exit(f"{error}. README.md says how to install.")

if __name__ == "__main__":
    sys.exit(main())
