"""Trained models as ONNX files, quantized if asked, and run by onnxruntime."""
