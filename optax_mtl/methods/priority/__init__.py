"""Priority: one task is the goal, and the others may help but not harm.

Look here for a main loss with auxiliary ones, a regulariser or a constraint.
"""
