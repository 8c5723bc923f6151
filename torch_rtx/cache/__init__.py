"""The engine cache: keys of named parts, byte stores, entries. The runtime cache: one file of kernels and tuning
results by device. Both import nothing of the package except its errors.
"""
