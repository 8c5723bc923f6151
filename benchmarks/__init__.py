"""Benchmarks of torch_rtx and the models that they, the demo and the tests share."""
