"""Losses: weights from the losses alone, for the price of one backward pass.

Look here when the losses differ in size or unit, and when gradients are too dear.
"""
