"""python -m bench: what this project claims, measured. One JSON line each."""
