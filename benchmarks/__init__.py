"""Time, memory and errors against peers and limits; what the compiler makes of the kernels."""
