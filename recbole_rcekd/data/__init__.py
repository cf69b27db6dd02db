"""RecBole's datasets, as teacher and student need them.

Here are sequential datasets that are split as general ones, the inputs of models (users, or rows of
sequences), and hashes that identify training data. Nothing here uses scores or teachers.
"""
