"""int8 by NNCF, on graphs that OpenVINO has read."""
