"""What a model is worth: pictures, and one file a metric in `metrics`."""
