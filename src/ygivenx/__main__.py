"""`python -m ygivenx` is `ygx`."""

from .cli import main

main()
