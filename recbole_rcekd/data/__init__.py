"""What is learned from: RecBole's datasets, as teacher and student need them.

Sequential datasets that split as general ones do, users and sequences as a model's input, and
hashes by which training data are known again. Nothing here knows a model's scores or a teacher.
"""
