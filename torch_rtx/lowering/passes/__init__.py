"""Passes, one per file, each a function `(graph, infer) -> graph`. `lowering.pipeline.PIPELINE` says in which order, and
what each one needs."""
