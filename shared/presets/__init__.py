"""Data that comes with both programs."""
