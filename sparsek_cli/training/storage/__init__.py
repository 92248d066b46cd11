"""What a run leaves on disk: checkpoints while it lasts, the finished model at its end."""
