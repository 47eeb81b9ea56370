"""What other settings would have decided on a recorded curve."""
