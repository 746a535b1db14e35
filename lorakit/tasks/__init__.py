"""The course's tasks, their data and the tiny base model."""
