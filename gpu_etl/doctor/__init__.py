"""`python -m gpu_etl doctor`: what is on this machine, and whether everything computes here what it should."""
