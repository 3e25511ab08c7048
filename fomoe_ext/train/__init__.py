"""`fomoe train`: starts the sites of a job; each process runs the training loop of its site.

May import everything below it; knows no other command.

    launching half      command, after the checks of preflight
    one process         process; start: all processes agree where the job begins; job: how options
                        become optimizer, schedule and OuterSync
    its site            site, built on state; making: model, optimizer, connections; divergence:
                        errors about NaN
    the loop            trainer: local_steps (captured, pace, round_progress), notes, meeting
                        (probing), validation, saving
    what is reported    speaker during the job, job_report at its end
"""
