"""What runs inside a compressed model."""
