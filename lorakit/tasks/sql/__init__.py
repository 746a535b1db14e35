"""Text to SQL: questions over tables in four levels, and execution accuracy."""
