"""What a configuration names: model, loss, metrics, optimizer."""
