"""What the commands of `ygx` do, one module each."""
