"""What runs on the device itself: the standard library and a TensorRT module, nothing else.

The host's backends import the same files; `export.device_bundle` zips them into one script.
"""
