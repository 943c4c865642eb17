"""This package repeats kernels of kernels/ in plain torch, under the same names of files and functions."""
