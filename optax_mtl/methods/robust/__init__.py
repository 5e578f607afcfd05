"""Robust: averages that a few wrong gradients do not move far, or of what agrees.

Look here when single tasks, or clients, may send outliers, and to merge models.
"""
