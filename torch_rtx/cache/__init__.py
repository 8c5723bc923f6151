"""The engine cache: keys of named parts, stores of bytes, entries. It needs nothing of the package but its errors."""
