"""The kernels of kernels/ in plain torch: the same files, the same functions."""
