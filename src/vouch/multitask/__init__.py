"""Several objectives in one network: gradient and loss balancing, task-wise optimizers, shared architectures."""
