"""Conflict: methods that turn the update by the directions of the gradients.

Look here when the cosines between the gradients of the tasks are below zero.
"""
