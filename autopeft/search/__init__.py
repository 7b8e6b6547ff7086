"""The outer loop: Optuna studies of knobs."""
