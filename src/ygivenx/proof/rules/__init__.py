"""The audit's rules: small functions from evidence to hits, each with its id, severity, reason and remedy.

A rule sees `Evidence` and yields a `Hit` for what is wrong; one that lacks what it needs yields nothing.
"""

from . import division, rows, text, trained
from .base import RULES, SEVERITIES, Hit, Rule

__all__ = ["RULES", "SEVERITIES", "Hit", "Rule", "division", "rows", "text", "trained"]
