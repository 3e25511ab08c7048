"""Processes of a job: how they are started, and what each knows of itself and of the others.

The launcher's: processes, link, namespace. In every process: world (which one it is), messages,
waiting, signals, console, inject (faults on purpose). May import config, placement and files; of
`fomoe_ext.train` it knows the name, to start it, and of model, meeting, fault tolerance nothing.
"""
