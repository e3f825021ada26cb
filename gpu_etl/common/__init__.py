"""What every folder here uses: buffers, threads, compiled functions, errors, codecs."""
