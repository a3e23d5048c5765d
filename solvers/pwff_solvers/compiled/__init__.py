"""Loops compiled by numba, and the functions that they are made of."""
