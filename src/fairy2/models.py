"""`convert_to_fairy2(model, num_stages=2, exclude_names=[...])`, as the Fairy2i guide imports it."""

from wrinklefree.methods.fairy2 import convert_to_fairy2

__all__ = ["convert_to_fairy2"]
