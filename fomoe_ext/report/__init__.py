"""What a run tells: its folder, metrics while it goes on, the report at its end.

May import config and files. Is given plain data; knows neither trainer nor model, needs no torch.
"""
