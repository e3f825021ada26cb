"""Data sets on disk -> batches of torch tensors. The batch is the contract with the model."""
