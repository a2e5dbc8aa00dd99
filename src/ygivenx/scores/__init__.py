"""Sums of log p along paths: ledger, scores, evaluation."""
