"""`python -m torchrelay`: the command line, where its script is not on PATH."""

from torchrelay.cli.main import main

main()
