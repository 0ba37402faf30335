"""Rounds told to TensorBoard, Weights & Biases or MLflow, as they are recorded."""
