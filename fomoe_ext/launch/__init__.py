"""Processes: started, watched, told of each other, on links that are slow on purpose.

World, launcher, messages, waiting, signals, console. May import config, placement and files; is
given what to start, and knows no model, meeting or fault tolerance.
"""
