"""`python -m jaxgpt`: the same as the command `jaxgpt`."""

from jaxgpt.cli.main import main

main()
