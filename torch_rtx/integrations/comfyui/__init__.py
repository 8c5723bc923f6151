"""Nodes for ComfyUI: a copy of this folder in its `custom_nodes`, or a link to it, where torch_rtx is installed."""

from torch_rtx.integrations.comfyui.nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
