"""Baselines: weights that depend on neither gradients nor losses.

Look here first, and compare everything else with these: each costs one backward pass.
"""
