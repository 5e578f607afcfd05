"""Ways to get the gradients of several tasks, one file a way."""
