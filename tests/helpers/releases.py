"""The release of PyTorch, for what differs between those that are supported."""

import torch

RELEASE = tuple(map(int, torch.__version__.split(".")[:2]))
