"""`python -m cli` is the `coresift` command."""

from cli.main import main

main()
