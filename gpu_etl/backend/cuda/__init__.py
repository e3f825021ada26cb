"""The functions over slabs on a GPU; a file has the name of its twin of the CPU."""
