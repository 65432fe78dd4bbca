"""`python -m imager` is the command `imager`."""

from imager.cli.main import main

main()
