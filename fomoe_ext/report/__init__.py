"""The output of a run: its folder, metrics during training, the report at the end; reading them.

May import config, placement, files and launch.console. Works on plain data; knows neither trainer
nor model, needs no torch.

    during training  run_log (progress, TensorBoard), metrics (metrics.jsonl), tally (counts), runs
                     (run folders), units
    the report       report, with tables from spent (time and bytes), course (loss over the run),
                     story (sites lost)
    as a page        page (page.jinja), plots, svg
    reading          command (fomoe report), stored, compare, measured (loads for other jobs)
"""
