"""Lowering: from a captured FX graph to a fused graph of the IR.

It imports nothing of the runtime or of the backend.
"""
