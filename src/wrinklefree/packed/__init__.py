"""Rank 2: packed layers inside transformers; importing this package registers the plug-in."""

from wrinklefree.packed import masters, plugin

plugin.register()
masters.register()
