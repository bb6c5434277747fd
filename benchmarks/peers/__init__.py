"""The other tools, each used as its own documentation says, and a runner that times what any of them made.

Nothing here uses Anneal's code: no backend of ours decides a peer's speed.
"""
