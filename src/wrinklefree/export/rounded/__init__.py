"""What an export may round: embedding, head and scales."""
