"""Products of a packed layer's codes with its inputs: native, Triton, compiled, decoded."""
