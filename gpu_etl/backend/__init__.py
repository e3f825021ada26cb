"""The same functions over slabs on a CPU and on a GPU."""
