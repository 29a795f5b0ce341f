"""`ScaleKDTrainer` and the parts that it owns."""
