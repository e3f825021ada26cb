"""The count and the encode pass, and what lies between them on disk."""
