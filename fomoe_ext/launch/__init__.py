"""Starts the processes of a job, and gives each of them its place and its messages.

For the launcher: processes, link, namespace. For every process: world (which site and rank it is),
messages, waiting, signals, console, logs (log messages as a command shows them), reader (a closed
output pipe) and inject (faults on purpose). May import config, placement and files. It knows
`fomoe_ext.train` by name only, to start it, and nothing of models, meetings or fault tolerance.
"""
