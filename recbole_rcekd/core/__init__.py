"""Pure tensors and files: what every other room stands on.

Shapes, settings, masked log-softmax, exact top-K, the closure gap, files that are whole or not
there, and several processes. Nothing here imports RecBole or another room.
"""
