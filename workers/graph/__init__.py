"""Passes over graphs: ONNX (and OpenVINO's IR) in, the same out. Stages import what they do to a graph from here.

No engine is built or measured here, and no backend is imported. A pass may run a library as a tool (ONNX Runtime's
quantizer and its CPU provider as the interpreter of a graph, OpenVINO's graph API, NNCF), inside its functions.
"""
