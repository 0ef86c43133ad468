"""One mesh of devices: what each axis divides, and the collectives that put it together again."""
