"""Tensor functions, settings and files, which every other part of the package uses.

Here are the shared types, settings, the masked log-softmax, exact top-K, the closure gap, files
that are written whole or not at all, and training in several processes. Nothing here imports
RecBole or another part of the package.
"""
