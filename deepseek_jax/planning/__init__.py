"""What a run will need, told before the machines for it are there."""
