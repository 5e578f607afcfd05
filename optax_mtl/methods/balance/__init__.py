"""Balance: methods that weigh the tasks by the magnitudes of their gradients.

Look here when the gradient of one task drowns those of the others.
"""
