"""Figures of merit: reconstruction, steering, unlearning."""
