"""What an export may round: embedding and head, scales."""
