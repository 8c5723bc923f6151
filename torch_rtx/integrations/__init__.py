"""What other libraries need to know of torch_rtx; each module is for one of them, and nothing imports it by itself."""
