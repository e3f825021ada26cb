"""The data set on disk: formats and manifest."""
