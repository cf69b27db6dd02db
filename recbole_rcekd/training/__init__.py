"""One student learns: settings, the KD terms of its loss, and RecBole's trainers distilling.

A *distiller* says which candidates are learned on and computes one term of the loss; the *trainer*
adds the terms to RecBole's own loop. Teachers that a command trains itself are trained here too.
"""
