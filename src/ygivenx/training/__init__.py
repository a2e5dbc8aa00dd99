"""Weighted sums of log p, descended."""
