"""Hidden states of a forest's nodes, through an unmodified transformers model."""
