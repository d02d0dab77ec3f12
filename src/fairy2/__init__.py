"""The Fairy2i guide's import name: a door to `wrinklefree.methods.fairy2`."""
