"""Raw Criteo days to a data set of 160-byte records, and from there to batches. Knows nothing of torch models."""
