"""Trained changes made smaller after training: entries dropped at random, values kept in a few bits."""
