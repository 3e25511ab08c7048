"""What a run tells: its folder, metrics while it goes on, the report at its end, both read again.

May import config, placement and files. Is given plain data; knows neither trainer nor model, needs
no torch.
"""
