"""Many small clients at once: clients of one shape train as one stack of tensors, each as if it were alone."""
