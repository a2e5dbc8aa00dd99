"""Attacks on ygivenx, each runnable with its outcome: `python -m attacks NAME`; see docs/reliability.md.

An attack is a module with `run(scale) -> dict`: counts of outcomes, and under `bad` what must not be. scale: 1 for a
run of many minutes, less for `make full`.
"""
