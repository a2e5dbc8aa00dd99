"""From hidden rows to log p and gradients, only for the edges that the loss needs."""
