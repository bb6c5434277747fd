"""OpenVINO graphs: the library, files of the intermediate representation, and known faults to keep clear of."""
