"""What makes a CPU faster and a step smaller, with the same results, and taken back afterwards."""
