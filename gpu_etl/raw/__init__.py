"""What a user names -> day files -> slabs of whole rows."""
