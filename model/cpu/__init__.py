"""The fused training step on a CPU."""
