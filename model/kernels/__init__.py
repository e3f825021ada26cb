"""Triton kernels of the training step. Importing a module of this room needs triton, which torch's CUDA builds bring
along; the room itself does not.

The torch code in model/layers/interaction.py, model/layers/optimizers.py and gpu_etl/load/batch.py is their
specification. Beside each kernel stands what it has to move and to compute at least (cost.py).
"""

MOST_TABLES, MOST_COLUMNS = 64, 512


def supported(tables: int, dim: int) -> bool:
    """Whether the kernels take this many tables of this dimension."""
    return tables <= MOST_TABLES and dim % 8 == 0 and dim <= MOST_COLUMNS
