"""The optional packages that ONNX models need. Importing this is an IntegrationError where one is missing."""

from __future__ import annotations

from torch_rtx.errors import IntegrationError

try:
    import numpy  # noqa: F401
    import onnx  # noqa: F401
    import onnx_ir  # noqa: F401
except ImportError as error:
    raise IntegrationError(f"ONNX models need the package {error.name}", hint="pip install 'torch_rtx[onnx]'") from None
