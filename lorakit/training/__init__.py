"""Training and answering: batches, loss, optimisers, loops, generation, evaluation."""
