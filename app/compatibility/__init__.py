"""Which backends take a model, told before anything is optimized: asked of the API, answered by workers."""
