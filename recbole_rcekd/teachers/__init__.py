"""Who teaches: one protocol, :class:`~recbole_rcekd.teachers.base.Teacher`, and its kinds.

A kind of teacher is one class and one line in a table (:mod:`~recbole_rcekd.teachers.load`): a
RecBole checkpoint, a file of scores, several of these, scores in memory, nobody. Nothing outside
this room asks what kind a teacher is.
"""
