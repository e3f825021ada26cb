"""The passes as tasks of a Dask cluster."""
