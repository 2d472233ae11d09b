"""What changes gradients or updates beyond PyTorch's own optimizers."""
