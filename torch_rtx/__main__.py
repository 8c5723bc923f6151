"""`python -m torch_rtx`: the command line of the Python that runs it, installed or not."""

from __future__ import annotations

from torch_rtx.cli.entry import main

if __name__ == "__main__":
    main()
