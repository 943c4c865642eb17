"""Measure time, memory and errors of rlloss against peers and limits, and inspect the compiled kernels."""
