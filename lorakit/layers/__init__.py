"""The layers: LoRA and its relatives, NF4, and the mathematics of low rank."""
