"""The engine cache: keys of named parts, stores of bytes, entries. The runtime cache: one file of what was learnt on
devices. Both need nothing of the package but its errors.
"""
