"""Passes, one per file, each a function `(graph, infer) -> graph`; `lowering.pipeline.PIPELINE` orders them, and says
what each needs."""
