"""A student as the backbone of segmentation and detection: data, models, training and metrics."""
