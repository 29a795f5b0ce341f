"""What this package uses of other libraries that is not public there, a room for each; `make private-names` lists it.

The hooks of `Trainer` that begin with an underscore are overridden in `training/trainer.py`.
"""
