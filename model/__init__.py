"""DLRM: the module, its embeddings, the training step, evaluation and checkpoints. Knows nothing of raw data files."""
