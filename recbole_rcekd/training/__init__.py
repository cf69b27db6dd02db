"""The training of one student: settings, the KD terms of its loss, and the trainers.

A *distiller* chooses the candidates and computes one KD term of the loss; the *trainer* adds the
terms to the loss of RecBole's trainer. Teachers that a command trains are trained here too.
"""
