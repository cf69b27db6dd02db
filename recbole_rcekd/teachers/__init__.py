"""Teachers: one interface, :class:`~recbole_rcekd.teachers.base.Teacher`, and its kinds.

A teacher is a RecBole checkpoint, a file of scores, several of these, scores in memory, or no
teacher at all. Each kind is one class, and a kind that ``--teacher`` can name is one line in a
table (:mod:`~recbole_rcekd.teachers.load`). Other packages never ask what kind a teacher is.
"""
