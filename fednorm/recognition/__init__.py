"""What the layers and tensors of any network are: by type, by formula, by a step of training, by declaration."""
