"""Generated kernels: from the body of a fused region to Triton source, and from there to binaries per SM target.

May import `ir`, `targets` and `errors`, so that a build worker needs no torch; Triton is imported where it is used.
"""
