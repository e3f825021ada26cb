"""The functions over slabs on a CPU."""
