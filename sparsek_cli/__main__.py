"""`python -m sparsek_cli` is `sparsek`."""

from sparsek_cli.app import main

main()
