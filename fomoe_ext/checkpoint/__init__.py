"""Checkpoints: what they hold, how they are written behind the training, and read again.

May import outer, layer and files. Is told what to save by an interface; knows no trainer.
"""
