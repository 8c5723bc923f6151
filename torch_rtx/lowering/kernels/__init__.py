"""Generated kernels: from the body of a region to its tactics with Triton source, and from there to binaries by target.

It needs no torch, so that processes that compile kernels start fast; Triton is imported where it is used.
"""
