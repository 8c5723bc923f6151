"""Lowering: from a captured FX graph to a fused graph of the IR.

May import `ir`, `aten`, `settings` and `errors`; nothing of the runtime or of the backend.
"""
