"""A blob's life, from its bytes to their end: how it is stored and noted (`content`), what refers to it (`references`),
what a tenant holds (`usage`), when what refers to it expires (`retention`), how it goes (`removal`, `collector`), and
whether rows and bytes agree (`checkup`)."""
