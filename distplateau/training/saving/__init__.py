"""What a run goes on from: checkpoints, and who may write them."""
