"""A fuzzer of engine files: damaged bytes, wrong structure, hostile calls. See `tests.fuzz.__main__`."""
