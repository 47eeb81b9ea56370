"""What a run leaves behind; readable on a laptop without torch."""
