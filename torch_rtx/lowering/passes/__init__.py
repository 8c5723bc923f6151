"""Passes, one per file, each a function `(graph, infer) -> graph`. `lowering.pipeline.PIPELINE` is their only order."""
