"""The logic of one row and one value: no files, no devices."""
