"""The only place that touches ONNX or an engine: export, proof, backends."""
