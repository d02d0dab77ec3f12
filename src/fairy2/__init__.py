"""The import name of the Fairy2i guide; the code is in `wrinklefree.methods.fairy2`."""
