"""The operators that kernels can hold, one declaration each: an ATen overload as tensors of `kernels.kernel_ir`."""
