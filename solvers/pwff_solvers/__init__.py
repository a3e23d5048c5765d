"""Numerical kernels of pwff_opt: arrays in, solutions out."""
