"""What is really trained: the probe, the audit, the callback."""
