"""How a model gets in: the torch.compile backend, ahead-of-time builds, explain and the command line."""
