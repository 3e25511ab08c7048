"""Processes of a job: how they are started, and what each knows of itself and of the others.

The launcher has processes, link and namespace. Every process has world (which one it is), messages,
waiting, signals, console, logs (what is logged, as a command shows it), reader (a pipe that was
closed) and inject (faults on purpose). May import config, placement and files. It knows the name
`fomoe_ext.train`, to start it, and nothing of models, meetings and fault tolerance.
"""
