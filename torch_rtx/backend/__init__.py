"""How a model gets in: the torch.compile backend, ahead-of-time builds, reuse of built engines, `explain`, commands."""
