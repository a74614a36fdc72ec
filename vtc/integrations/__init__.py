"""vtc inside other programs. Nothing here is imported by ``import vtc``."""
