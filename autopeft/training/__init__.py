"""The inner loop: training, evaluation, checkpoints, seeds."""
