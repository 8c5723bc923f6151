"""Families of kernels: one file for each kind of anchor, see `family`."""
