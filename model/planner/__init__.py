"""Which rank holds which table, and what a step will cost."""
