"""`python -m dicomnode` is the `dicomnode` command."""

from dicomnode.cli import main

main()
