"""Rank 2: packed layers and the transformers plug-in that loads them. Importing this package registers the plug-in."""

from wrinklefree.packed.quantizer import register

register()
