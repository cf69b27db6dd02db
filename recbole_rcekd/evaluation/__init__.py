"""What came out: metrics, reports, and how far a student is from its teacher.

Teacher and students are measured alike, on the student's data. Nothing here trains.
"""
