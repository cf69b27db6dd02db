"""Evaluation: metrics, reports, and how far a student is from its teacher.

Teacher and students are measured in the same way, on the student's data. Nothing is trained here.
"""
