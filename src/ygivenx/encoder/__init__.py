"""Which tokens are y: a row becomes sequences whose weights are what the model itself would have produced."""
