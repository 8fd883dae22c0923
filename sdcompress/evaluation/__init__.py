"""What a model is worth: pictures, and later one file a metric."""
