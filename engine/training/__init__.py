"""Training a task's model: the order of the images, rates, optimiser, checkpoints, workers."""
