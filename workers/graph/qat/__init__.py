"""Quantization-aware training of an exported program: its weights learn to be rounded.

The program's own graph is rounded where the product's Q/DQ passes round (`placement`), with torch's differentiable
fake quantization (`rounding`), and trained so that it answers as the program did before (`distance`, `training`). What
comes out are new weights for the same graph, and the ranges that they were trained with: these go with the graph to the
Q/DQ nodes of the engine (`workers.graph.learned_ranges`).

Libraries were looked at first. NNCF trains eager modules only (of graphs it has post-training quantization); torchao's
QAT of exported programs rounds where Inductor wants it, and recognizes batch norms by their form in training, which a
program exported for inference no longer has. Trained weights serve only where training rounds what the engine rounds.
"""
