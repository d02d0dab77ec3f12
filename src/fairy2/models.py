"""`convert_to_fairy2(model, num_stages=2, exclude_names=[...])`, under the name that the Fairy2i guide imports."""

from wrinklefree.methods.fairy2 import convert_to_fairy2

__all__ = ["convert_to_fairy2"]
