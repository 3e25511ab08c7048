"""`fomoe train`: before the start, one process of a job, and the loop of its site.

May import all that is below it; knows no other command.

    before the sites    command starts them, after preflight
    one process         process; start: all agree where the job begins; job: what a job is
    its site            site, of state and the parts below; making: model, optimizer, connections;
                        divergence: what is said when values are NaN
    the loop            trainer: local_steps (pace, round_progress), notes, meeting (probing),
                        validation, saving
    what is told        speaker meanwhile, job_report at the end
"""
