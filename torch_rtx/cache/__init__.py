"""The engine cache: keys of named parts, byte stores, entries. The runtime cache: one file of compiled and of measured
tactics by device. Both import nothing of the package except its errors.
"""
