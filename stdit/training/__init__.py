"""Training: the step, its optimizers and averages, and the run folder that keeps them."""
